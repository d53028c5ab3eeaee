"""Every row trains the same network; ratios are within a round; what lacks is named."""

import math

import jax
import pytest

from experiments import benchmark
from experiments.errors import ConfigError
from experiments.harness.workdir import read_json
from experiments.models.works import WORKS, mlp
from experiments.peers.row import FLOAT32, Case, Row, Step


@pytest.fixture(scope="module")
def case():
    keys = jax.random.split(jax.random.key(0))
    work = mlp(64)
    return Case(work, work.init_params(keys[0]), work.make_batch(keys[1], 32))


@pytest.fixture(scope="module")
def float32_loss(case):
    (row, *_) = benchmark.all_rows()
    assert row.name == FLOAT32
    return benchmark._loss_after(row.build(case))


@pytest.mark.filterwarnings("ignore")  # The peers' own.
@pytest.mark.parametrize("row", benchmark.all_rows(), ids=lambda row: row.name)
def test_every_row_takes_the_same_steps(row, case, float32_loss):
    if not row.is_installed():
        pytest.skip(row.needs[1])
    loss = benchmark._loss_after(row.build(case))
    assert abs(loss / float32_loss - 1) <= benchmark.TOLERANCE


def test_rows_are_named_once_and_compared_with_others_that_exist():
    rows = benchmark.all_rows()
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    assert {row.reference for row in rows} <= set(names)
    assert {work for row in rows for work in row.works or ()} <= set(WORKS)


def test_what_a_row_is_compared_with_comes_along():
    rows, _ = benchmark.choose(benchmark.all_rows(), "convnet", "float16, EMA|EMA$")
    assert [row.name for row in rows] == [
        FLOAT32,
        "mpjax, float16",
        "mpjax, float16, dynamic",
        "mpjax, float16, dynamic, EMA",
    ]


def test_a_library_that_is_not_here_is_named_and_left_out():
    there = Row(FLOAT32, lambda case: None, FLOAT32)
    missing = Row("other", lambda case: None, FLOAT32, needs=("no_such", "pip it"))
    rows, left_out = benchmark.choose([there, missing], "mlp", "")
    assert [row.name for row in rows] == [FLOAT32]
    assert left_out == {"other": "pip it"}


def test_ratios_are_medians_of_ratios_and_a_wrong_loss_is_marked():
    times = {FLOAT32: [10.0, 20.0, 40.0], "half": [5.0, 5.0, 20.0]}
    steps = dict.fromkeys(times, Step(lambda: 0.0, 3_000_000))
    row = Row("half", lambda case: None, FLOAT32)
    right = benchmark.summary(row, times, {FLOAT32: 2.0, "half": 2.02}, steps)
    assert (right["ratio"], right["speedup"]) == (0.5, 2.0)
    assert right["temporary_mb"] == 3.0
    assert right["is_right"]
    for loss in (2.5, math.nan):
        wrong = benchmark.summary(row, times, {FLOAT32: 2.0, "half": loss}, steps)
        assert not wrong["is_right"]


def test_rounds_time_every_row_once_in_changing_order():
    seen = []
    steps = {name: Step(lambda name=name: seen.append(name) or 0.0) for name in "abc"}
    times = benchmark.time_rounds(steps, 6, seed=0)
    rounds = [seen[i : i + 3] for i in range(0, 18, 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({tuple(names) for names in rounds}) > 1
    assert [len(t) for t in times.values()] == [6, 6, 6]


@pytest.mark.slow
def test_it_leaves_a_table_and_a_plot(tmp_path, capsys):
    config = benchmark.Config(
        works="convnet",
        rows="mpjax, bfloat16$",
        batch_size=4,
        num_rounds=2,
        output_dir=tmp_path,
    )
    (table,) = benchmark.main(config)
    (file,) = tmp_path.glob("benchmark_convnet_*.json")
    assert read_json(file) == table
    assert file.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert [run["name"] for run in table["runs"]] == [FLOAT32, "mpjax, bfloat16"]
    assert "DeepConvNet" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"works": "mpl"}, "must be some of mlp, convnet.*got 'mpl'"),
        ({"rows": "("}, "no regular expression"),
        ({"num_rounds": 0}, "num-rounds"),
    ],
)
def test_bad_flags_are_told(flags, message):
    with pytest.raises(ConfigError, match=message):
        benchmark.Config(**flags)


def test_a_pattern_found_nowhere_lists_the_rows():
    with pytest.raises(ConfigError, match=r"in no row of mlp.*mpjax, float32"):
        benchmark.choose(benchmark.all_rows(), "mlp", "jaxamp")
