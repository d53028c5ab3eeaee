"""`python -m experiments.tables` writes the tables of pages, or only checks them."""

import json

import pytest
from helpers import cli_runs

from experiments import tables
from experiments.harness.errors import ExperimentError

NAMES = ["mnist_convnet", "parity_512x256x10-cast"]
STALE = "".join(f"Before {n}.\n<!-- table: {n} -->\nold\n<!-- end -->\n" for n in NAMES)


@pytest.fixture
def readme(tmp_path, monkeypatch):
    path = tmp_path / "README.md"
    path.write_text(STALE)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    return path


def test_it_writes_the_tables_and_says_which(readme, capsys):
    assert tables.main(tables.Config()) == NAMES
    text = readme.read_text()
    assert "| mixed_float16 | static:128 |" in text
    assert [line for line in text.splitlines() if line.startswith("Before")] == [
        f"Before {name}." for name in NAMES
    ]
    assert str(readme) in capsys.readouterr().out
    assert tables.main(tables.Config()) == []
    assert "up to date" in capsys.readouterr().out
    assert readme.read_text() == text


def test_check_names_what_is_out_of_date_and_changes_nothing(readme):
    tables.main(tables.Config())
    tables.main(tables.Config(check=True))
    text = readme.read_text().replace("mixed_float16 | static:128", "another")
    readme.write_text(text)
    with pytest.raises(ExperimentError, match=f"out of date: {NAMES[1]}") as error:
        tables.main(tables.Config(check=True))
    assert error.value.exit_code == 1
    assert readme.read_text() == text


@pytest.mark.parametrize("damage", ["missing", "cut", "another"])
def test_a_result_file_that_is_missing_or_damaged(
    damage, readme, tmp_path, monkeypatch
):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    if damage != "missing":
        text = {"cut": '{"experiment": "mnist', "another": "[1, 2]"}[damage]
        (tmp_path / f"{NAMES[0]}.json").write_text(text)
    with pytest.raises(ExperimentError, match=r"mnist_convnet\.json.*restore the file"):
        tables.main(tables.Config())
    assert readme.read_text() == STALE


@pytest.mark.slow
def test_help_says_what_it_writes_and_a_wrong_flag_writes_nothing():
    readme = tables.ROOT / "README.md"
    before = readme.read_bytes()
    code, out, _ = cli_runs.run("--help", module="experiments.tables")
    assert code == 0
    assert "README.md" in out
    assert "--check" in out
    code, _, err = cli_runs.run("--chek", module="experiments.tables")
    assert code == 2
    assert "--check" in err
    assert readme.read_bytes() == before


def test_an_older_file_is_read_in_todays_names():
    old = {
        "experiment": "benchmark",
        "renamed_from": {
            "speed": "benchmark",
            "experiments.benchmarks.speed": "experiments.benchmark",
            "--workloads": "--works",
            "workload": "work",
            "matches_reference": "is_right",
        },
        "work": "mlp",
        "environment": {"command": "python -m experiments.benchmark --works mlp"},
        "runs": [{"name": "by hand, float32", "is_right": True}],
    }
    kept = json.dumps(old)
    new = tables.in_todays_names(old)
    assert json.dumps(old) == kept
    assert (new["experiment"], new["workload"]) == ("speed", "mlp")
    assert new["runs"] == [{"name": "by hand, float32", "matches_reference": True}]
    assert new["environment"] == {
        "command": "python -m experiments.benchmark --works mlp",
        "command_today": "python -m experiments.benchmarks.speed --workloads mlp",
    }


def test_every_committed_command_runs_by_its_name_today():
    from experiments.registry import COMMANDS

    modules = {c.module for commands in COMMANDS.values() for c in commands}
    files = sorted(tables.RESULTS.glob("*.json"))
    assert files
    for file in files:
        result = tables.in_todays_names(json.loads(file.read_text()))
        assert result["experiment"] in tables.COLUMNS
        python, flag, module, *_ = result["environment"]["command_today"].split()
        assert (python, flag) == ("python", "-m")
        assert module in modules
