"""Mandarin speech recognition by CTC: float32 beside mixed precision.

    python -m experiments.speech_ctc
    python -m experiments.speech_ctc --workdir RUN --transcribe a.wav
    python -m experiments.speech_ctc --manifest own.jsonl --init-from RUN

The speech evidence of "Mixed Precision Training" (arXiv:1710.03740, section 3.1), at a
size for a CPU. The network is like Deep Speech 2 (arXiv:1512.02595): two convolutions
over time and frequency, bidirectional GRUs, and CTC over the letters of pinyin. The
speech is synthesised by espeak-ng the first time (`pip install -e ".[speech]"`); the
test set has voices and phrases that the training set has not. In float32 that takes 5
minutes on 2 CPU cores, synthesis included, and gives a character error rate of 8.2 %.
--dataset and --manifest name real corpora and your own recordings; --init-from starts
from a trained network.
"""

from experiments.configs.speech_ctc import Config
from experiments.harness import cli

if __name__ == "__main__":  # before what is slow to import
    cli.run_module("experiments.speech_ctc", Config, doc=__doc__)

import dataclasses

import optax

from experiments.data.speech.corpus import Corpus
from experiments.data.speech.listen import write_examples
from experiments.data.speech.prepared import PreparedCorpus, prepare, texts
from experiments.data.speech.vocabulary import Vocabulary
from experiments.harness import results
from experiments.harness.experiment import Experiment, Metric, Task
from experiments.harness.files import translate_os_errors
from experiments.harness.output import count_text
from experiments.harness.report import report
from experiments.harness.results import Column, Result
from experiments.harness.training import train_policy
from experiments.models import recognition
from experiments.models.fine_tuning import make_init_from, make_trainable, take_network
from experiments.models.optimizers import one_cycle
from experiments.models.posteriors import draw_posteriors
from experiments.models.recognizer import keep_vocabulary, make_recognizer
from experiments.models.speech.model import SpeechModel
from experiments.models.transcription import transcribe

NAME = "speech_ctc"


def main(config: Config, corpus: Corpus | None = None) -> Result | None:
    """Trains once per policy, compares, and leaves everything in the workdir.

    Args:
      config: the settings.
      corpus: the corpus, instead of the one that the config names.

    Returns:
      The result; its runs have `test_cer`, `ms_per_step`, ... None with `listen` and
      with `transcribe`.

    Raises:
      ExperimentError: for data, files or checkpoints that fail, or after a signal.
      NonFiniteTrainingError: if the gradients stay non-finite.
    """
    if config.transcribe:
        for transcript in transcribe(config, NAME):
            print(transcript, flush=True)
        return None
    if config.init_from is not None:
        config = take_network(config, NAME)
    corpus = corpus or config.load_corpus()
    if config.listen is not None:
        for path in write_examples(config.listen, corpus):
            print(path)
        return None
    experiment = make_experiment(has_words=corpus.has_words)
    model, prepared = make_model(config, corpus)

    def train_one(config, policy, directory):
        with translate_os_errors(config.workdir):
            keep_vocabulary(config.workdir, prepared.vocabulary)
        task = make_task(config, policy, model, prepared, has_words=corpus.has_words)
        run, state = train_policy(experiment, task, config, policy, directory)
        recognizer = make_recognizer(
            model,
            {"params": state.params, "model_state": state.model_state},
            prepared.vocabulary,
            policy,
            autocast=config.autocast,
            num_mels=config.num_mels,
            decode=config.make_decoder(),
        )
        title = f"{corpus.name}, {config.encoder}, {policy}"
        with translate_os_errors(directory):
            draw_posteriors(
                directory / "posteriors.png", title, recognizer, corpus.test
            )
        return run

    result = results.run_policies(NAME, config, train_one)
    title = f"{corpus.name}, {config.encoder}, {count_text(config.num_epochs, 'epoch')}"
    report(experiment, result, title)
    return result


def make_experiment(*, has_words: bool = False) -> Experiment:
    """Returns what is measured: word errors, too, where a corpus has words."""
    metrics = [
        Metric("loss", "loss", is_larger_better=False),
        Metric("cer", "CER", is_larger_better=False, format="{:.2%}"),
    ]
    if has_words:
        metrics.append(Metric("wer", "WER", is_larger_better=False, format="{:.2%}"))
    more = (
        Column("encoder", "encoder"),
        Column("parameters", "num_parameters", "{:,}"),
        Column("epochs", "num_epochs"),
    )
    return Experiment(NAME, tuple(metrics), headline="cer", more_columns=more)


def make_model(config: Config, corpus: Corpus) -> tuple[SpeechModel, PreparedCorpus]:
    """Returns the network for a corpus's vocabulary, and the corpus in batches.

    Raises:
      DataError: if a split has no utterance that the network can align.
    """
    vocabulary = Vocabulary.of(texts(corpus))
    prepared = prepare(
        corpus,
        vocabulary,
        config.num_outputs,
        num_mels=config.num_mels,
        augments=config.spec_augment,
        batch_size=config.batch_size,
        seed=config.seed,
        num_buckets=config.num_buckets,
        sort_first_epoch=config.sorta_grad,
        num_workers=config.num_workers,
    )
    return config.make_network(vocabulary), prepared


def make_task(
    config: Config,
    policy: str,
    model: SpeechModel,
    corpus: PreparedCorpus,
    *,
    has_words: bool = False,
) -> Task:
    """Returns what one policy trains.

    With `init_from` the config has a `workdir`, to keep the initial weights in.
    """
    num_steps = corpus.train.num_batches * config.num_epochs
    init = trainable = None
    if config.init_from is not None:
        init = make_init_from(config, NAME, corpus.vocabulary)
        if config.trainable is not None:
            trainable = make_trainable(config.trainable, init)
    task = recognition.make_task(
        model,
        corpus,
        make_tx(config, num_steps),
        policy,
        autocast=config.autocast,
        num_epochs=config.num_epochs,
        num_microbatches=config.num_microbatches,
        has_words=has_words,
        decode=config.make_decoder(),
        init=init,
        trainable=trainable,
    )
    return dataclasses.replace(task, facts={**task.facts, "encoder": config.encoder})


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
