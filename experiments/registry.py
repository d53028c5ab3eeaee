"""The commands of this package, in the groups that `python -m experiments` lists."""

from typing import NamedTuple


class Command(NamedTuple):
    """A module that runs as `python -m MODULE`.

    Attributes:
      module: its full name; it has a `Config` and a `main`.
      summary: what it does, in one line.
    """

    module: str
    summary: str


COMMANDS: dict[str, tuple[Command, ...]] = {
    "Reproduce a source": (
        Command(
            "experiments.mnist_mlp",
            "The Keras mixed-precision guide on MNIST: float32 beside mixed_float16.",
        ),
        Command(
            "experiments.mnist_convnet",
            "DeepConvNet on MNIST: trained in float32 and half, evaluated in six "
            "precisions.",
        ),
        Command(
            "experiments.speech_ctc",
            "Mandarin speech recognition by CTC: float32 beside mixed precision.",
        ),
        Command(
            "experiments.speech_updates",
            "What float32 master weights are for: Mandarin speech updated in float16.",
        ),
        Command(
            "experiments.ssd_digits",
            "Loss scaling on a single-shot detector: float32 beside mixed precision.",
        ),
        Command(
            "experiments.ssd_scales",
            "Loss scales in float16 on a single-shot detector, beside float32 and "
            "bfloat16.",
        ),
    ),
    "Measure": (
        Command(
            "experiments.benchmarks.speed",
            "Step times of mpjax beside other libraries, interleaved.",
        ),
        Command(
            "experiments.benchmarks.memory",
            "Memory of a training step in mixed precision, over batch sizes.",
        ),
        Command(
            "experiments.benchmarks.scaling",
            "Memory, communication and step times of language models on 1 to 512 GPUs.",
        ),
        Command(
            "experiments.benchmarks.accuracy",
            "Gradient errors of autocast and of casting by hand, and their step times.",
        ),
        Command(
            "experiments.benchmarks.loss_curves",
            "Losses and accuracy of training in float32, half by hand, and autocast.",
        ),
        Command(
            "experiments.benchmarks.float8",
            "Training in float8 beside bfloat16 and float32, paired by seed.",
        ),
        Command(
            "experiments.benchmarks.loss_scales",
            "Loss scales in float16: skipped steps, underflow, gradient errors, step "
            "times.",
        ),
        Command(
            "experiments.benchmarks.convolutions",
            "Times of a convolution in float32, in bfloat16, and as a bfloat16 matmul.",
        ),
        Command(
            "experiments.benchmarks.recurrence",
            "Times of a bidirectional GRU: this project's, Flax's and PyTorch's.",
        ),
        Command(
            "experiments.benchmarks.speech_profile",
            "Where the time of a speech recognizer's training step goes, part by part.",
        ),
        Command(
            "experiments.benchmarks.parity",
            "Test accuracy of `mnist_mlp` over policies, loss scales and seeds.",
        ),
    ),
    "Maintain": (
        Command(
            "experiments.tables",
            "Writes the tables of README.md and docs/ from the result files.",
        ),
        Command(
            "experiments.plots",
            "Draws the pictures of the results, and of README.md, from the files.",
        ),
    ),
}
