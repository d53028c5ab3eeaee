"""A resumed run that is longer than it was."""

import dataclasses
import json
from typing import ClassVar

import pytest

from experiments import mnist_mlp, speech_ctc, speech_updates
from experiments.configs import mnist_convnet
from experiments.harness import results
from experiments.harness.config import BaseConfig
from experiments.harness.errors import WorkdirError

POLICIES = ("float32", "mixed_bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(BaseConfig):
    EXTENSIBLE: ClassVar[tuple[str, ...]] = ("num_epochs",)

    policies: str = ",".join(POLICIES)
    num_epochs: int = 2
    num_units: int = 8


class ConstantConfig(Config):
    SCHEDULE_SPANS_RUN: ClassVar[bool] = False


@pytest.fixture
def run(tmp_path, capsys):
    """Runs two policies that only count epochs; returns the result and what it says."""

    def train_one(config, policy, directory):
        if config.num_checkpoints:
            (directory / "checkpoints" / str(config.num_epochs)).mkdir(parents=True)
        return {"policy": policy, "num_epochs": config.num_epochs}

    def run(config_type=Config, **settings):
        config = config_type(workdir=tmp_path / "run", **settings)
        capsys.readouterr()
        result = results.run_policies("tiny", config, train_one)
        return result, capsys.readouterr().out

    return run


@pytest.mark.parametrize("config_type", [Config, ConstantConfig])
def test_every_policy_goes_on_and_the_settings_follow(run, config_type):
    run(config_type)
    result, out = run(config_type, num_epochs=4, resume=True)
    assert [values["num_epochs"] for values in result.runs] == [4, 4]
    assert "num_epochs grows from 2 to 4: the run goes on past its old end" in out
    assert "finished before" not in out
    settings = json.loads((result.workdir / "config.json").read_text())
    assert settings["num_epochs"] == 4
    again, out = run(config_type, num_epochs=4, resume=True)
    assert again == result
    assert [f"{p}: finished before, not run again" in out for p in POLICIES] == [1, 1]


def test_a_schedule_that_spans_the_run_makes_another_result_and_says_so(run):
    result, out = run()
    assert "extended" not in out + str(result.environment["notes"])
    run(num_epochs=4, resume=True)
    result, out = run(num_epochs=8, resume=True)
    (note,) = (n for n in result.environment["notes"] if "extended" in n)
    assert "num_epochs 2 then 4 then 8" in note
    assert f"note: {note}" in out
    written = json.loads((result.workdir / "result.json").read_text())
    assert note in written["environment"]["notes"]


def test_with_a_constant_learning_rate_there_is_nothing_to_say(run):
    run(ConstantConfig)
    result, out = run(ConstantConfig, num_epochs=4, resume=True)
    assert "extended" not in out + str(result.environment["notes"])
    settings = json.loads((result.workdir / "config.json").read_text())
    assert settings.keys() == {"experiment", *ConstantConfig().comparable()}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"num_epochs": 1, "resume": True},
            r"is 2 there and 1 here \(--resume",
        ),
        ({"num_epochs": 4}, r"\(num_epochs was 2\); pass --resume"),
        ({"num_epochs": 4, "num_units": 9, "resume": True}, "num_units is 8 there"),
    ],
)
def test_what_is_no_extension_is_refused_and_changes_nothing(run, settings, message):
    workdir = run()[0].workdir
    before = {p: p.read_bytes() for p in workdir.rglob("*.json")}
    with pytest.raises(WorkdirError, match=message):
        run(**settings)
    assert {p: p.read_bytes() for p in workdir.rglob("*.json")} == before


def test_without_checkpoints_there_is_nothing_to_go_on_from(run):
    workdir = run(num_checkpoints=0)[0].workdir
    with pytest.raises(WorkdirError, match="has no checkpoint to go on from"):
        run(num_checkpoints=0, num_epochs=4, resume=True)
    assert (workdir / "result.json").exists()
    assert run(num_checkpoints=0, resume=True)[0].runs[0]["num_epochs"] == 2


def test_experiments_say_what_can_be_extended_and_what_their_schedule_spans():
    for config_type in (mnist_mlp.Config, mnist_convnet.Config, speech_ctc.Config):
        assert config_type.EXTENSIBLE == ("num_epochs",)
    assert not mnist_mlp.Config.SCHEDULE_SPANS_RUN
    assert mnist_convnet.Config.SCHEDULE_SPANS_RUN
    assert speech_ctc.Config.SCHEDULE_SPANS_RUN
    assert speech_updates.Config.EXTENSIBLE == ()
