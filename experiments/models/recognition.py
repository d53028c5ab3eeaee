"""Loss and evaluation of networks that recognize speech by CTC.

Batches are those of `experiments.data.speech.batches`. B denotes the batch size, T the
outputs of the network in time, V the symbols of the vocabulary.
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm.auto import tqdm

import mpjax
from experiments.data.extra import import_extra
from experiments.data.speech.batches import Batch
from experiments.data.speech.prepared import PreparedCorpus
from experiments.data.speech.vocabulary import Vocabulary, collapse
from experiments.harness.experiment import Task
from experiments.models.speech.loss import ctc_loss, mean_ctc_loss

NUM_SHOWN = 3  # transcriptions that an evaluation prints

# (log probabilities (T, V), vocabulary) -> text
Decoder = Callable[[np.ndarray, Vocabulary], str]


def make_task(
    model: nn.Module,
    corpus: PreparedCorpus,
    tx: optax.GradientTransformation,
    policy: str,
    *,
    autocast: bool,
    num_epochs: int,
    num_microbatches: int = 1,
    has_words: bool = False,
    decode: Decoder | None = None,
    init: Callable[[jax.Array], tuple[Any, Any]] | None = None,
    trainable: Callable[[str], bool] | None = None,
) -> Task:
    """Returns the task of training a recognizer.

    Args:
      model: a Linen module; see `SpeechModel`.
      corpus: the data.
      tx: the optimizer, without loss scaling.
      policy: the precision policy to evaluate in.
      autocast: how the policy is applied; see `mpjax.make_eval_step`.
      num_epochs: passes over the training data.
      num_microbatches: as in `mpjax.make_train_step`; an utterance weighs the same in
        each.
      has_words: whether to measure word error rates as well.
      decode: from log probabilities to text; by default the most probable path.
      init: as in `Task`; by default the model's own.
      trainable: as in `Task`.
    """
    return Task(
        batches=corpus.train,
        steps_per_epoch=corpus.train.num_batches,
        num_epochs=num_epochs,
        init=init or make_init(model, corpus.train.num_features),
        tx=tx,
        loss_fn=make_loss_fn(model),
        evaluate=make_evaluate(
            model, corpus, policy, autocast=autocast, has_words=has_words, decode=decode
        ),
        data=corpus.in_words(),
        facts={
            "dataset": corpus.name,
            "num_epochs": num_epochs,
            "left_out": corpus.left_out,
        },
        step_options={
            "loss_weight": count_utterances,
            "num_microbatches": num_microbatches,
        },
        trainable=trainable,
    )


def count_utterances(batch: Batch) -> Any:
    """Returns how many rows of a batch are not padding: its `loss_weight`."""
    return jnp.sum(jnp.asarray(batch["num_frames"]) > 0)


def make_init(model: nn.Module, num_features: int) -> Callable[..., Any]:
    """Returns `key -> (params, model_state)`, for one utterance of some frames."""

    @jax.jit
    def init(key):
        features = jnp.zeros((1, 64, num_features))
        variables = model.init(key, features, jnp.array([64]), train=False)
        params = variables.pop("params")
        return params, variables

    return init


def make_loss_fn(model: nn.Module) -> Callable[..., Any]:
    """Returns `loss_fn(params, model_state, batch, key)` as `make_train_step` takes it.

    The loss is the mean over utterances of the CTC loss, in float32. In aux stand their
    number, and that of those that the outputs are too few for, whose loss is 0.
    """

    def loss_fn(params, model_state, batch, key):
        (logits, num_outputs), updated = model.apply(
            {"params": params, **model_state},
            batch["features"],
            batch["num_frames"],
            train=True,
            rngs={"dropout": key},
            mutable=list(model_state),
        )
        loss, counts = mean_ctc_loss(
            logits, num_outputs, batch["labels"], batch["num_labels"]
        )
        aux = {
            "num_examples": counts["num_utterances"],
            "num_infeasible": counts["num_infeasible"],
        }
        return loss, ({**model_state, **updated}, aux)

    return loss_fn


class Transcribed(NamedTuple):
    """What was said and what was heard, in a set of utterances.

    Attributes:
      references: what was said.
      hypotheses: what was heard.
      loss: the mean CTC loss.
    """

    references: list[str]
    hypotheses: list[str]
    loss: float


def make_evaluate(
    model: nn.Module,
    corpus: PreparedCorpus,
    policy: str,
    *,
    autocast: bool = True,
    has_words: bool = False,
    decode: Decoder | None = None,
) -> Callable[[mpjax.TrainState, str], dict[str, float]]:
    """Returns `(state, split) -> {"loss": ..., "cer": ...}`, and "wer" for words.

    It prints a few transcriptions.

    Args:
      model: a Linen module; see `SpeechModel`.
      corpus: the data; the batches of `split` are evaluated.
      policy: the precision policy to evaluate in.
      autocast: how the policy is applied; see `mpjax.make_eval_step`.
      has_words: whether to measure word error rates.
      decode: from log probabilities to text; by default the most probable path.
    """
    eval_step = make_eval_step(model, policy, autocast=autocast)

    def evaluate(state, split):
        batches = getattr(corpus, split).in_order()
        heard = transcribe(eval_step, state, batches, corpus.vocabulary, decode)
        rates = error_rates(heard.references, heard.hypotheses, has_words=has_words)
        show(heard, split)
        return {"loss": heard.loss, **rates}

    return evaluate


def make_eval_step(model: nn.Module, policy: str, *, autocast: bool = True) -> Any:
    """Returns a jitted `(state, batch) -> outputs` without dropout.

    The outputs are `losses` (B,) float32, `path` (B, T) int32, the most probable
    symbols, `num_outputs` int32 (B,), and `log_probabilities` (B, T, V) float32.
    """

    def eval_fn(params, model_state, batch):
        outputs: Any = model.apply(
            {"params": params, **model_state},
            batch["features"],
            batch["num_frames"],
            train=False,
        )
        logits, num_outputs = outputs
        losses, _ = ctc_loss(logits, num_outputs, batch["labels"], batch["num_labels"])
        logits = logits.astype(jnp.float32)
        return {
            "losses": losses,
            "path": jnp.argmax(logits, axis=-1).astype(jnp.int32),
            "num_outputs": num_outputs,
            "log_probabilities": jax.nn.log_softmax(logits),
        }

    return mpjax.make_eval_step(eval_fn, policy=policy, autocast=autocast)


def transcribe(
    eval_step: Any,
    state: mpjax.TrainState,
    batches: Iterable[Batch],
    vocabulary: Vocabulary,
    decode: Decoder | None = None,
) -> Transcribed:
    """Evaluates batches, and decodes what was heard."""
    references, hypotheses, losses = [], [], []
    for batch in batches:
        outputs = dict(eval_step(state, batch))
        if decode is None:
            del outputs["log_probabilities"]
        outputs = jax.device_get(outputs)
        for row in np.flatnonzero(batch["num_frames"]).tolist():
            labels = batch["labels"][row, : batch["num_labels"][row]]
            references.append(vocabulary.decode(labels))
            hypotheses.append(_decode_row(outputs, row, vocabulary, decode))
            losses.append(float(outputs["losses"][row]))
    return Transcribed(references, hypotheses, float(np.mean(losses)))


def error_rates(
    references: list[str], hypotheses: list[str], *, has_words: bool = False
) -> dict[str, float]:
    """Returns the character error rate, `cer`, and with words `wer`, by jiwer.

    That is the number of insertions, deletions and substitutions of all utterances, by
    the number of characters (words) of all references.
    """
    jiwer = import_extra("jiwer", extra="speech")
    rates = {"cer": float(jiwer.cer(references, hypotheses))}
    if has_words:
        rates["wer"] = float(jiwer.wer(references, hypotheses))
    return rates


def show(heard: Transcribed, split: str) -> None:
    """Prints a few references, evenly spaced, with what was heard."""
    num = len(heard.references)
    for index in np.linspace(0, num - 1, min(NUM_SHOWN, num)).astype(int):
        said, understood = heard.references[index], heard.hypotheses[index]
        tqdm.write(f"  {split}: {said!r} heard as {understood!r}", file=sys.stdout)


def _decode_row(
    outputs: Mapping[str, Any],
    row: int,
    vocabulary: Vocabulary,
    decode: Decoder | None,
) -> str:
    length = outputs["num_outputs"][row]
    if decode is not None:
        return decode(outputs["log_probabilities"][row, :length], vocabulary)
    return vocabulary.decode(collapse(outputs["path"][row, :length]))
