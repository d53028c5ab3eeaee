"""What `experiments.benchmarks.float8` trains, and in which precisions."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax

import mpjax
from experiments import mnist_mlp, speech_ctc
from experiments.benchmarks._loss_curve_tasks import Task, Variant, transformer
from experiments.configs import mnist_mlp as mlp_config
from experiments.configs import speech_ctc as speech_config
from experiments.configs.float8 import Config
from experiments.data.speech.mandarin_config import MandarinConfig
from experiments.harness.experiment import Task as HarnessTask

FLOAT8 = "mixed_float8:all"
FLOAT32, BFLOAT16, EDGES = "float32", "mixed_bfloat16", "first and last in bfloat16"

# By task, the name scopes of the first and the last layer.
_MLP_EDGES = r"Dense_[02]$"
_CONFORMER_EDGES = r"conformer_in$|classes$"


def mlp(config: Config) -> Task:
    """Returns the Keras guide's network on images of digits, as `mnist_mlp` trains it.

    The first layer sees the pixels, the last one gives the logits.
    """
    run = mlp_config.Config(
        num_units=config.num_units,
        batch_size=config.mlp_batch_size,
        num_epochs=config.mlp_epochs,
        dataset=config.dataset,
    )
    images = run.load_dataset()

    def make(seed):
        splits = mnist_mlp.make_splits(run, images)
        return mnist_mlp.make_task(dataclasses.replace(run, seed=seed), FLOAT32, splits)

    return _from_harness(
        f"MLP 784-{run.num_units}-{run.num_units}-10 on {images.name}",
        make,
        _MLP_EDGES,
        {
            "dataset": images.name,
            "batch_size": run.batch_size,
            "num_epochs": run.num_epochs,
        },
    )


def bytes_transformer(config: Config) -> Task:
    """Returns the transformer of `loss_curves`, unrolled.

    Its first and last layers are its first and last blocks, and the logits.
    """
    task = transformer(
        width=config.width,
        num_layers=config.num_layers,
        length=128,
        batch_size=config.batch_size,
        num_steps=config.num_steps,
    )
    edges = rf"Block_(0|{config.num_layers - 1})(/|$)|attend$"
    return task._replace(variants=_variants(task.variants[FLOAT32], edges))


def conformer(config: Config) -> Task:
    """Returns the Conformer of `speech_ctc`, on as much speech as `speech_updates` has.

    The first layer projects what the convolutions give, the last one gives the logits.
    """
    run = speech_config.Config(
        encoder="conformer",
        mandarin=MandarinConfig(num_train=config.num_utterances),
        num_epochs=config.conformer_epochs,
        batch_size=config.conformer_batch_size,
    )
    corpus = run.load_corpus()

    def make(seed):
        seeded = dataclasses.replace(run, seed=seed)
        model, prepared = speech_ctc.make_model(seeded, corpus)
        return speech_ctc.make_task(seeded, FLOAT32, model, prepared)

    return _from_harness(
        f"Conformer on {corpus.name}",
        make,
        _CONFORMER_EDGES,
        {"num_train": config.num_utterances, "num_epochs": run.num_epochs},
    )


TASKS: dict[str, Callable[[Config], Task]] = {
    "mlp": mlp,
    "transformer": bytes_transformer,
    "conformer": conformer,
}


def _variants(float32: Variant, edges: str) -> dict[str, Variant]:
    """Returns the precisions; `edges` is a pattern of the first and last layers."""
    rules = mpjax.PolicyRules([(edges, BFLOAT16)], default=FLOAT8)
    policies = {BFLOAT16: BFLOAT16, FLOAT8: FLOAT8, EDGES: rules}
    others = {name: float32._replace(policy=x) for name, x in policies.items()}
    return {FLOAT32: float32, **others}


def _from_harness(
    title: str,
    make: Callable[[int], HarnessTask],
    edges: str,
    facts: dict[str, Any],
) -> Task:
    """Returns an experiment's task; it is tested in float32.

    Args:
      title: as in `Task`.
      make: `seed -> task`; the seed decides the order of the data.
      edges: pattern of the first and last layers.
      facts: as in `Task`.
    """
    first = make(0)

    def make_batches(seed: int) -> Iterator[Any]:
        return iter(make(seed).batches)

    def evaluate(state: mpjax.TrainState) -> dict[str, float]:
        found = first.evaluate(state, "test")
        error = found["cer"] if "cer" in found else 1 - found["accuracy"]
        return {"loss": found["loss"], "error": error}

    init = jax.jit(first.init)
    has_state = first.init(jax.random.key(0))[1] is not None
    float32 = Variant(
        init=lambda key: init(key)[0],
        loss_fn=first.loss_fn,
        evaluate=evaluate,
        init_model_state=(lambda key: init(key)[1]) if has_state else None,
    )
    return Task(
        title=title,
        variants=_variants(float32, edges),
        make_batches=make_batches,
        tx=first.tx,
        num_steps=first.num_steps,
        step_options=dict(first.step_options),
        facts=facts,
    )
