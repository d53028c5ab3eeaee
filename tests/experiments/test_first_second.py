"""What a beginner mistypes is answered before JAX is imported."""

import importlib
import json
import subprocess
import sys

import pytest
from helpers import cli_runs

import mpjax
from experiments import mnist_convnet, speech_updates
from experiments.benchmarks import (
    _accuracy_real,
    loss_curves,
    loss_scales,
    real_models,
    workloads,
)
from experiments.benchmarks import scaling as scaling_benchmark
from experiments.configs import accuracy, memory, scaling, speed
from experiments.configs import loss_curves as loss_curves_config
from experiments.configs import loss_scales as loss_scales_config
from experiments.configs import mnist_convnet as mnist_convnet_config
from experiments.configs import speech_updates as speech_updates_config
from experiments.harness import cli, config, precisions
from experiments.registry import COMMANDS

MODULES = [command.module for group in COMMANDS.values() for command in group]
# What a run imports, and its flags need not.
HEAVY = (
    "flax",
    "grain",
    "jax",
    "matplotlib",
    "mpjax",
    "orbax",
    "scipy",
    "sklearn",
    "tensorflow_datasets",
    "torch",
    "tqdm",
)
POLICIES = ["--policies", "float32,mixed_flaot16"]
BAD_VALUES = {
    "experiments.mnist_mlp": [
        POLICIES,
        ["--policy", "float61"],
        ["--loss-scale", "dinamic"],
        ["--batch-size", "-8"],
        ["--dataset", "minst"],
        ["--resume"],
        ["--resume", "--workdir", "/no/such/run"],
        ["--data-dir", "/no/such/directory"],
        ["--workdir", "/dev/null/no/such"],
        ["--policy", "float32", "--policies", "mixed_float16"],
    ],
    "experiments.mnist_convnet": [
        POLICIES,
        ["--precisions", "flaot16"],
        ["--load", "/no/such.safetensors"],
    ],
    "experiments.speech_ctc": [
        POLICIES,
        ["--batch-size", "-8"],
        ["--encoder", "bigur"],
        ["--dataset", "aishell"],
        ["--mandarin.num-train", "0"],
        ["--transcribe", "a.wav"],
        ["--dataset", "aishell", "--data-dir", "/no/such/directory"],
        ["--manifest", "/no/such.jsonl"],
        ["--init-from", "/no/such/run"],
        ["--workdir", "/no/such/run", "--transcribe", "a.wav"],
    ],
    "experiments.speech_updates": [["--adam-variants", "float61"]],
    "experiments.ssd_digits": [
        POLICIES,
        ["--preset", "sdd300"],
        ["--scenes.max-digits", "0"],
        ["--dataset", "voc"],
        ["--image-size", "0"],
        ["--image-size", "64", "--preset", "ssd300"],
        ["--predict", "a.png"],
        ["--voc-years", "2010"],
        ["--dataset", "voc", "--data-dir", "/no/such/directory"],
        ["--init-weights", "/no/such.safetensors"],
        ["--workdir", "/no/such/run", "--predict", "a.png"],
    ],
    "experiments.ssd_scales": [["--variants", "scale_9"], ["--policy", "float16"]],
    "experiments.benchmarks.speed": [
        ["--workloads", "mpl"],
        ["--attention", "flash"],
    ],
    "experiments.benchmarks.memory": [
        ["--workloads", "mpl"],
        ["--device", "h1000"],
    ],
    "experiments.benchmarks.scaling": [
        ["--models", "gpt_70b"],
        ["--num-gpus", "12"],
        ["--device", "h1000"],
    ],
    "experiments.benchmarks.accuracy": [["--workloads", "lama"]],
    "experiments.benchmarks.loss_curves": [["--tasks", "convet"]],
    "experiments.benchmarks.float8": [["--tasks", "mpl"], ["--dataset", "minst"]],
    "experiments.benchmarks.loss_scales": [
        ["--networks", "mpl"],
        ["--loss-scales", "static:8,dinamic"],
    ],
    "experiments.benchmarks.convolutions": [["--num-channels", "0"]],
    "experiments.benchmarks.recurrence": [["--num-units", "0"]],
    "experiments.benchmarks.speech_profile": [["--num-rounds", "1"]],
    "experiments.benchmarks.parity": [POLICIES, ["--dataset", "minst"]],
    "experiments.tables": [],
    "experiments.plots": [["--only", "("]],
}
# Runs each command as `python -m` does, in one process; prints what each had imported.
SCRIPT = """
import contextlib, io, json, runpy, sys

for module, *flags in json.loads(sys.argv[1]):
    sys.argv = [module, *flags]
    code, err = None, io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as error:
            code = error.code
    loaded = sorted({name.partition(".")[0] for name in sys.modules})
    print(json.dumps([code, err.getvalue(), loaded]))
"""


@pytest.fixture(scope="module")
def answers():
    """Exit code, stderr and loaded packages of each command with wrong flags."""
    assert set(BAD_VALUES) == set(MODULES)
    calls = [(module, "--help") for module in MODULES]
    calls += [(module, "--no-such-flag", "8") for module in MODULES]
    calls += [(m, *flags) for m, bad in BAD_VALUES.items() for flags in bad]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(calls)],
        cwd=cli_runs.ROOT,
        env=cli_runs.environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    lines = map(json.loads, done.stdout.splitlines())
    return dict(zip(calls, lines, strict=True))


def test_nothing_heavy_is_imported_before_the_flags_are_read(answers):
    loaded = {
        call: heavy
        for call, (_, _, packages) in answers.items()
        if (heavy := set(HEAVY) & set(packages))
    }
    assert loaded == {}


def test_each_is_answered_as_what_it_is(answers):
    for call, (code, err, _) in answers.items():
        flag = call[1]
        if "/no/such" in "".join(call):
            assert (code, call[-1] in err or call[2] in err) == (1, True), (call, err)
        elif flag == "--help":
            assert (code, err) == (0, ""), call
        else:
            assert code == 2, (call, err)
            assert flag == "--no-such-flag" or flag in err, (call, err)
        assert "Traceback" not in err, call


def test_misspelt_names_are_corrected(answers):
    for call, right in {
        ("experiments.mnist_mlp", *POLICIES): "mixed_float16",
        ("experiments.mnist_mlp", "--loss-scale", "dinamic"): "dynamic",
        ("experiments.mnist_mlp", "--dataset", "minst"): "mnist",
        ("experiments.mnist_convnet", "--precisions", "flaot16"): "float16",
        ("experiments.benchmarks.speed", "--workloads", "mpl"): "mlp",
        ("experiments.benchmarks.memory", "--device", "h1000"): "h100",
    }.items():
        assert f"Did you mean {right!r}?" in " ".join(answers[call][1].split())


def test_the_names_that_are_checked_early_are_all_that_there_are():
    assert tuple(mpjax.PRESETS) == config.PRESETS
    names = {"half", *importlib.import_module("jmp._src.policy").name_to_dtype}
    assert names <= {*config.PRESETS, *config.DTYPES}
    assert tuple(workloads.WORKLOADS) == speed.WORKLOADS
    assert set(memory.BATCH_SIZES) <= set(workloads.WORKLOADS)
    assert tuple(real_models.REAL_MODELS) == memory.REAL_MODELS
    assert ("present", *mpjax.cost.device_names()) == memory.DEVICES
    assert tuple(scaling_benchmark.MODELS) == scaling.MODELS
    assert tuple(_accuracy_real.MODELS) == accuracy.ALL_MODELS
    assert tuple(loss_curves.TASKS) == loss_curves_config.TASKS
    assert tuple(loss_scales.TASKS) == loss_scales_config.NETWORKS
    assert tuple(precisions.PRECISIONS) == mnist_convnet_config.PRECISIONS
    assert set(speech_updates.WRAPPERS) <= set(speech_updates_config.VARIANTS)
    assert mnist_convnet.Config is mnist_convnet_config.Config


@pytest.mark.parametrize("name", [*config.DTYPES, "c=f16", " p=f32, c=bf16"])
def test_what_jmp_reads_is_accepted(name):
    if name != "f64":
        config.check_policy("--policy", name)
    mpjax.get_policy(name)


def test_help_fills_its_lines(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["experiment", "--help"])
    module = importlib.import_module("experiments.benchmarks.memory")
    with pytest.raises(SystemExit):
        cli.run(module.main, memory.Config, doc=module.__doc__)
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines if not line.startswith("    ")) <= 80
    # Not where the lines of the docstrings end.
    assert any("(`mpjax.cost`; needs" in x and x.endswith("where") for x in lines)
    assert any('"auto" for' in x and '"cudnn" for cuDNN' in x for x in lines)
