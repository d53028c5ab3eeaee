"""The parts of the speech recognizer's step, their times and their sum."""

import statistics

import pytest

from experiments.benchmarks import speech_profile
from experiments.harness.errors import ConfigError
from experiments.harness.files import read_json


@pytest.mark.slow
def test_the_parts_add_up_to_the_step(tmp_path, capsys):
    output = tmp_path / "profile.json"
    config = speech_profile.Config(
        num_seconds=0.5, batch_size=2, num_rounds=3, output=output
    )
    table = speech_profile.main(config)
    assert read_json(output) == table
    *parts, step = table["runs"]
    names = [*speech_profile.PARTS, speech_profile.LOSS, speech_profile.UPDATE]
    assert [part["name"] for part in parts] == names
    assert step["name"] == speech_profile.STEP
    for i, whole in enumerate(step["times_ms"]):
        total = sum(part["times_ms"][i] for part in parts)
        assert total == pytest.approx(whole, abs=0.01)
    assert step["ms"] == pytest.approx(statistics.median(step["times_ms"]), abs=1e-3)
    assert step["share"] == 1
    assert "2 utterances of at most 0.5 s" in capsys.readouterr().out


@pytest.mark.slow
def test_a_cut_stops_the_network_after_its_part():
    """Layers behind the cut have no gradient, those before have one."""
    import jax

    fns = speech_profile._cuts(
        speech_profile.Config(num_seconds=0.5, batch_size=2, num_rounds=2)
    )
    reached = []
    for name in speech_profile.PARTS:
        grads = fns[name]()
        reached.append(
            {k for k, g in grads.items() if any(x.any() for x in jax.tree.leaves(g))}
        )
    assert "conv_2" not in reached[0]
    assert "recurrent_1" not in reached[1]
    assert "recurrent_1" in reached[2]
    assert "recurrent_2" not in reached[2]
    assert "recurrent_2" in reached[3]
    assert "classes" not in reached[3]


def test_one_round_has_no_quartiles():
    with pytest.raises(ConfigError, match="--num-rounds must be 2 or more"):
        speech_profile.Config(num_rounds=1)
