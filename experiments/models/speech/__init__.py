"""The acoustic model of a speech recognizer, and its loss, for padded batches."""

from experiments.models.speech.loss import CTCLosses, ctc_loss, mean_ctc_loss
from experiments.models.speech.model import SpeechModel

__all__ = ["CTCLosses", "SpeechModel", "ctc_loss", "mean_ctc_loss"]
