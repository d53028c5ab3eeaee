"""The list of commands, and the --help of each."""

import dataclasses
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import experiments
import experiments.__main__ as listing
from experiments import mnist_mlp
from experiments.harness import cli
from experiments.registry import COMMANDS

PACKAGE = Path(experiments.__file__).parent
ALL = [command for commands in COMMANDS.values() for command in commands]
MODULES = [command.module for command in ALL]


def test_every_command_is_registered_once():
    programs = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for path in PACKAGE.rglob("*.py")
        if "cli.run_module(" in path.read_text()
    }
    assert programs == set(MODULES)
    assert len(MODULES) == len(programs)


def test_the_list_has_every_command_and_its_summary(capsys):
    listing.main([])
    out = capsys.readouterr().out
    places = [out.index(f"{group}:\n") for group in COMMANDS]
    assert places == sorted(places)
    for command in ALL:
        summary = importlib.import_module(command.module).__doc__.splitlines()[0]
        assert command.summary == summary
        assert f"python -m {command.module}\n        {summary}\n" in out


def test_the_list_comes_without_jax():
    code = (
        "import sys, experiments.__main__ as listing\n"
        "listing.main([])\n"
        "assert 'jax' not in sys.modules and 'tyro' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, check=True)


def test_the_list_takes_no_arguments(capsys):
    with pytest.raises(SystemExit) as exit_info:
        listing.main(["mnist_mlp"])
    assert exit_info.value.code == 2
    err = capsys.readouterr().err
    assert "unrecognized arguments: mnist_mlp" in err
    assert "run it as: python -m experiments.mnist_mlp" in err


@pytest.mark.parametrize("name", MODULES)
def test_help_names_every_flag_with_its_text(name, monkeypatch, capsys):
    module = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", ["command", "--help"])
    with pytest.raises(SystemExit) as exit_info:
        cli.run(module.main, module.Config, doc=module.__doc__)
    assert exit_info.value.code == 0
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert module.__doc__.splitlines()[0] in out
    for field in dataclasses.fields(module.Config):
        flag = "--" + field.name.replace("_", "-")
        _, _, after = out.partition(f" {flag}")
        help_text, _, _ = after.partition("(default")
        assert len(help_text.split()) >= 3, flag


@pytest.mark.parametrize("name", ["experiments.benchmarks.parity"])
def test_help_is_a_command_of_its_own(name):
    command = [sys.executable, "-m", name, "--help"]
    done = subprocess.run(
        command, cwd=PACKAGE.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"usage: python -m {name}" in done.stdout


@pytest.mark.parametrize("flag", ["--num_units", "--num-units"])
def test_flags_are_spelled_with_either_line(flag, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["experiment", flag, "7"])
    seen = []
    cli.run(seen.append, mnist_mlp.Config, doc=None)
    assert seen[0].num_units == 7
