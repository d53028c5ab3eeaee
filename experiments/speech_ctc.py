"""Mandarin speech recognition by CTC: float32 beside mixed precision.

    python -m experiments.speech_ctc
    python -m experiments.speech_ctc --workdir RUN --transcribe a.wav

The speech evidence of "Mixed Precision Training" (arXiv:1710.03740, section 3.1), at a
size for a CPU. The network is like Deep Speech 2 (arXiv:1512.02595): two convolutions
over time and frequency, bidirectional GRUs, and CTC over the letters of pinyin. The
speech is synthesised by espeak-ng the first time (`pip install -e ".[speech]"`); the
test set has voices and phrases that the training set has not. --dataset and --manifest
name real corpora and your own recordings.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import optax

from experiments.data.speech.config import SpeechConfig
from experiments.data.speech.corpus import Corpus
from experiments.data.speech.listen import write_examples
from experiments.data.speech.prepared import PreparedCorpus, prepare, texts
from experiments.data.speech.vocabulary import Vocabulary
from experiments.harness import cli, results
from experiments.harness.config import require, require_positive
from experiments.harness.errors import ConfigError
from experiments.harness.experiment import Experiment, Metric, Task
from experiments.harness.files import translate_os_errors, write_json
from experiments.harness.report import report
from experiments.harness.results import Column, Result
from experiments.harness.training import train_policy
from experiments.models import recognition
from experiments.models.optimizers import one_cycle
from experiments.models.speech.model import Encoder, SpeechModel
from experiments.models.speech_decoding import beam_search

NAME = "speech_ctc"
VOCABULARY = "vocabulary.json"
Optimizer = Literal["adam", "nesterov"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(SpeechConfig):
    """Settings of the experiment."""

    policies: str = "float32,mixed_float16,mixed_bfloat16"
    """Precision policies to train in, separated by commas; the same seed in each."""

    encoder: Encoder = "bigru"
    """bigru or bilstm; gru_lookahead, forward in time with a lookahead convolution as
    in the paper; or conformer."""

    num_channels: int = 8
    """Channels of the two convolutions."""

    num_units: int = 96
    """Units of each direction of a recurrent layer, or width of a Conformer block."""

    num_layers: int = 2
    """Layers of the encoder."""

    subsampling: Literal[2, 4] = 2
    """Frames per output: 2 or 4."""

    num_epochs: int = 3
    """Passes over the training set."""

    batch_size: int = 32
    """Utterances per step."""

    num_microbatches: int = 1
    """Parts of a batch whose gradients are added up; an utterance weighs the same."""

    optimizer: Optimizer = "adam"
    """adam, or nesterov: SGD with Nesterov momentum, the paper's."""

    momentum: float = 0.9
    """Momentum of nesterov."""

    learning_rate: float = 2e-3
    """Largest learning rate; it rises for a tenth of the steps, then falls to 0."""

    max_grad_norm: float = 5.0
    """Gradients of a larger norm are scaled down to it."""

    beam_width: int = 0
    """Decode by prefix beam search of this width; 0 takes the most probable path."""

    listen: Path | None = None
    """Write a few utterances, as WAV with a picture each, to this directory, and train
    nothing."""

    def __post_init__(self):
        """Checks the settings.

        Raises:
          ConfigError: for the first that cannot work.
        """
        super().__post_init__()
        require_positive(self, "num_channels", "num_units", "num_layers", "num_epochs")
        require_positive(self, "batch_size", "num_microbatches", "learning_rate")
        require_positive(self, "max_grad_norm")
        require(0 <= self.momentum < 1, "--momentum", "from 0 to less than 1", self)
        require(self.beam_width >= 0, "--beam-width", "0 or more", self)
        if self.batch_size % self.num_microbatches:
            raise ConfigError(
                f"--num-microbatches {self.num_microbatches} must divide --batch-size "
                f"{self.batch_size}."
            )

    def comparable(self) -> dict[str, Any]:
        """Returns the settings to compare, without what changes no number."""
        values = super().comparable()
        return {k: v for k, v in values.items() if k != "listen"}


def main(config: Config, corpus: Corpus | None = None) -> Result | None:
    """Trains once per policy, compares, and leaves everything in the workdir.

    Args:
      config: the settings.
      corpus: the corpus, instead of the one that the config names.

    Returns:
      The result; its runs have `test_cer`, `ms_per_step`, ... None with `listen`.

    Raises:
      ExperimentError: for data, files or checkpoints that fail, or after a signal.
      NonFiniteTrainingError: if the gradients stay non-finite.
    """
    corpus = corpus or config.load_corpus()
    if config.listen is not None:
        for path in write_examples(config.listen, corpus):
            print(path)
        return None
    experiment = make_experiment(corpus)
    model, prepared = make_model(config, corpus)

    def train_one(config, policy, directory):
        task = make_task(config, policy, model, prepared, has_words=corpus.has_words)
        run, _ = train_policy(experiment, task, config, policy, directory)
        with translate_os_errors(directory):
            write_json(directory / VOCABULARY, prepared.vocabulary.to_json())
        return run

    result = results.run_policies(NAME, config, train_one)
    title = f"{corpus.name}, {config.encoder}, {config.num_epochs} epochs"
    report(experiment, result, title)
    return result


def make_experiment(corpus: Corpus) -> Experiment:
    """Returns the metrics of a corpus: word errors where its texts have words."""
    metrics = [
        Metric("loss", "loss", is_larger_better=False),
        Metric("cer", "CER", is_larger_better=False, format="{:.2%}"),
    ]
    if corpus.has_words:
        metrics.append(Metric("wer", "WER", is_larger_better=False, format="{:.2%}"))
    more = (Column("epochs", "num_epochs"),)
    return Experiment(NAME, tuple(metrics), headline="cer", more_columns=more)


def make_model(config: Config, corpus: Corpus) -> tuple[SpeechModel, PreparedCorpus]:
    """Returns the network for a corpus's vocabulary, and the corpus in batches.

    Raises:
      DataError: if a split has no utterance that the network can align.
    """
    vocabulary = Vocabulary.of(texts(corpus))
    model = SpeechModel(
        num_classes=vocabulary.size,
        encoder=config.encoder,
        num_channels=config.num_channels,
        num_units=config.num_units,
        num_layers=config.num_layers,
        subsampling=config.subsampling,
    )
    prepared = prepare(
        corpus,
        vocabulary,
        lambda num_frames: -(-num_frames // config.subsampling),
        num_mels=config.num_mels,
        augments=config.spec_augment,
        batch_size=config.batch_size,
        seed=config.seed,
        num_buckets=config.num_buckets,
        sort_first_epoch=config.sorta_grad,
        num_workers=config.num_workers,
    )
    return model, prepared


def make_task(
    config: Config,
    policy: str,
    model: SpeechModel,
    corpus: PreparedCorpus,
    *,
    has_words: bool = False,
) -> Task:
    """Returns what one policy trains."""
    num_steps = corpus.train.num_batches * config.num_epochs
    return recognition.make_task(
        model,
        corpus,
        make_tx(config, num_steps),
        policy,
        autocast=config.autocast,
        num_epochs=config.num_epochs,
        num_microbatches=config.num_microbatches,
        has_words=has_words,
        decode=make_decoder(config.beam_width),
    )


def make_tx(config: Config, num_steps: int) -> optax.GradientTransformation:
    """Returns the optimizer, with clipping, without loss scaling."""
    schedule = one_cycle(config.learning_rate, num_steps)
    optimizers = {
        "adam": optax.adam(schedule),
        "nesterov": optax.sgd(schedule, momentum=config.momentum, nesterov=True),
    }
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm), optimizers[config.optimizer]
    )


def make_decoder(beam_width: int) -> recognition.Decoder | None:
    """Returns prefix beam search of a width, or None for the most probable path."""
    if not beam_width:
        return None
    return lambda log_probabilities, vocabulary: vocabulary.decode(
        beam_search(log_probabilities, beam_width)
    )


if __name__ == "__main__":
    cli.run(main, Config, doc=__doc__)
