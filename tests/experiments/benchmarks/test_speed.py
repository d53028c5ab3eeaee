"""Every baseline trains the same network; ratios are within a round."""

import math
import re
import time
import weakref

import jax
import numpy as np
import pytest
from helpers.tools import thinned

from experiments.benchmarks import speed
from experiments.benchmarks.baselines import warmup
from experiments.benchmarks.baselines.baseline import FLOAT32, Baseline, Case, Step
from experiments.benchmarks.workloads import WORKLOADS, mlp
from experiments.harness.errors import ConfigError
from experiments.harness.files import read_json


@pytest.fixture(scope="module")
def case():
    keys = jax.random.split(jax.random.key(0))
    workload = mlp(64)
    params = workload.init_params(keys[0])
    return Case(workload, params, workload.make_batch(keys[1], 32))


@pytest.fixture(scope="module")
def float32(case):
    (baseline, *_) = speed.all_baselines()
    assert baseline.name == FLOAT32
    return warmup.warm_up(baseline, case)


@pytest.mark.filterwarnings("ignore")  # The peers' own.
@pytest.mark.parametrize(
    "baseline",
    thinned(speed.all_baselines(), 8, rest="weekly"),
    ids=lambda baseline: baseline.name,
)
def test_every_baseline_takes_the_same_steps(baseline, case, float32):
    if not baseline.is_installed():
        pytest.skip(baseline.needs[1])
    assert warmup.matches_reference(
        warmup.warm_up(baseline, case).losses, float32.losses
    )


@pytest.mark.slow
def test_keras_scales_the_loss_in_float16(case):
    keras = pytest.importorskip("keras")
    made = []

    class Scaler(keras.optimizers.LossScaleOptimizer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    baselines = {baseline.name: baseline for baseline in speed.all_baselines()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras.optimizers, "LossScaleOptimizer", Scaler)
        for policy in ("float32", "mixed_bfloat16", "mixed_float16"):
            step = baselines[f"Keras, {policy}"].build(case)
            assert len(made) == (policy == "mixed_float16")
    step.run(2)
    assert int(made[0].iterations) == 2
    assert float(made[0].dynamic_scale) == 2.0**15


def test_baselines_are_named_once_and_compared_with_others_that_exist():
    baselines = speed.all_baselines()
    names = [baseline.name for baseline in baselines]
    assert len(set(names)) == len(names)
    assert {baseline.reference for baseline in baselines} <= set(names)
    for baseline in baselines:
        assert set(baseline.workloads or ()) <= set(WORKLOADS)


def test_the_reference_of_a_chosen_baseline_comes_along():
    baselines, _ = speed.choose(speed.all_baselines(), "convnet", "float16, EMA|EMA$")
    assert [baseline.name for baseline in baselines] == [
        FLOAT32,
        "mpjax, float16",
        "mpjax, float16, dynamic",
        "mpjax, float16, dynamic, EMA",
    ]


def test_a_missing_library_is_named_and_left_out():
    there = Baseline(FLOAT32, lambda case: None, FLOAT32)
    missing = Baseline("other", lambda case: None, FLOAT32, needs=("no_such", "pip it"))
    baselines, left_out = speed.choose([there, missing], "mlp", "")
    assert [baseline.name for baseline in baselines] == [FLOAT32]
    assert left_out == {"other": "pip it"}


def test_ratios_are_medians_of_ratios_within_a_round():
    times = {FLOAT32: [10.0, 20.0, 40.0], "half": [5.0, 5.0, 20.0]}
    step = Step(lambda num_steps: 0.0, 3_000_000)
    compiled = dict.fromkeys(times, warmup.Compiled(step, (2.2, 2.0), 1.0))
    baseline = Baseline("half", lambda case: None, FLOAT32)
    found = speed.summarize(baseline, times, compiled)
    assert (found["ratio"], found["speedup"]) == (0.5, 2.0)
    assert found["temporary_mb"] == 3.0
    assert found["matches_reference"]


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ((2.21, 2.02), True),
        ((2.2, 2.5), False),
        ((2.2, math.nan), False),
        ((2.01, 2.01), False),  # It stands still.
        ((1.99, 2.01), False),  # It climbs.
    ],
)
def test_a_wrong_loss_is_reported(losses, expected):
    assert warmup.matches_reference(losses, (2.2, 2.0)) == expected


def test_rounds_time_every_baseline_once_in_changing_order():
    seen = []
    steps = {name: Step(lambda _, name=name: seen.append(name)) for name in "abc"}
    times = speed.time_steps(steps, 6, 0, dict.fromkeys(steps, 1))
    rounds = [seen[i : i + 3] for i in range(0, 18, 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({tuple(names) for names in rounds}) > 1
    assert [len(t) for t in times.values()] == [6, 6, 6]


def test_short_steps_are_timed_together_and_given_one_by_one():
    taken = []

    def run(num_steps):
        taken.append(num_steps)
        time.sleep(0.002 * num_steps)
        return 0.0

    num_steps = speed.num_steps_to_time(Step(run))
    assert 5 <= num_steps <= 25
    times = speed.time_steps({"a": Step(run)}, 2, 0, {"a": num_steps})
    assert taken[0] == 1
    assert taken[-2:] == [num_steps, num_steps]
    assert all(t >= 2.0 for t in times["a"])


def test_many_steps_end_where_as_many_single_ones_do(case):
    baselines = {baseline.name: baseline for baseline in speed.all_baselines()}
    baseline = baselines["mpjax, bfloat16, dynamic"]
    one, many = baseline.build(case), baseline.build(case)
    losses = [one.run() for _ in range(4)]
    assert many.run(4) == losses[-1] != losses[0]


def test_baselines_for_a_gpu_are_not_timed_elsewhere():
    for platform, found in (("cpu", False), ("gpu", True)):
        baselines, _ = speed.choose(speed.all_baselines(), "mlp", "", platform)
        assert any(baseline.platform == "gpu" for baseline in baselines) == found


def test_a_baseline_that_fails_costs_the_others_nothing(case):
    def fail(case):
        raise MemoryError("out of memory\nallocating")

    there, *_ = speed.all_baselines()
    baselines = [there, Baseline("greedy", fail, FLOAT32)]
    compiled, failures = warmup.warm_up_all(baselines, case)
    assert set(compiled) == {FLOAT32}
    assert failures == {"greedy": "MemoryError: out of memory"}
    with pytest.raises(MemoryError):
        warmup.warm_up_all([Baseline(FLOAT32, fail, FLOAT32)], case)


def test_a_baseline_that_is_left_out_keeps_no_memory(case):
    there, *_ = speed.all_baselines()
    kept, seen = [], []

    def greedy(case):
        held = np.zeros(4)
        kept.append(weakref.ref(held))

        def run(num_steps=1):
            raise MemoryError(held.size)

        return Step(run)

    def after(case):
        seen.append(kept[0]())
        return there.build(case)

    baselines = [
        there,
        Baseline("greedy", greedy, FLOAT32),
        Baseline("after", after, FLOAT32),
    ]
    warmup.warm_up_all(baselines, case)
    assert seen == [None]


@pytest.mark.parametrize(
    ("ms", "text"),
    [(0.0123, "0.01230"), (1.39, "1.390"), (99.4, "99.40"), (305000, "305000")],
)
def test_a_time_has_four_digits_and_no_exponent(ms, text):
    assert speed.format_ms(ms) == text


@pytest.mark.parametrize("slow_part", ["compiling", "first step"])
def test_a_baseline_slow_beyond_measure_is_left_out_unless_asked_for(
    slow_part, monkeypatch
):
    def build(is_slow):
        def run(num_steps=1):
            time.sleep(0.3 * (is_slow and slow_part == "first step"))
            return 1.0

        time.sleep(0.3 * (is_slow and slow_part == "compiling"))
        return Step(run)

    monkeypatch.setattr(warmup, "MAX_FIRST_S", 0.2)
    baselines = [
        Baseline(FLOAT32, lambda case: build(False), FLOAT32),
        Baseline("quick", lambda case: build(False), FLOAT32),
        Baseline("sluggish", lambda case: build(True), FLOAT32),
    ]
    compiled, left_out = warmup.warm_up_all(baselines, None, time_limit=True)
    assert set(compiled) == {FLOAT32, "quick"}
    assert re.search(r"its first step took \d+ s.*ask for it", left_out["sluggish"])
    compiled, left_out = warmup.warm_up_all(baselines, None, time_limit=False)
    assert compiled["sluggish"].losses == (1.0, 1.0)
    assert not left_out


def test_after_some_minutes_no_further_baseline_is_begun(case):
    there, *_ = speed.all_baselines()
    baselines = [there, Baseline("late", there.build, FLOAT32)]
    compiled, left_out = warmup.warm_up_all(baselines, case, max_minutes=1e-9)
    assert set(compiled) == {FLOAT32}
    assert left_out == {"late": "1e-09 minutes had gone by"}


@pytest.mark.weekly
def test_it_leaves_a_table_and_a_plot(tmp_path, capsys):
    config = speed.Config(
        workloads="convnet",
        baselines="mpjax, bfloat16$",
        batch_size=4,
        num_rounds=2,
        output_dir=tmp_path,
    )
    (table,) = speed.main(config)
    (file,) = tmp_path.glob("speed_convnet_*.json")
    assert read_json(file) == table
    assert file.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert [run["name"] for run in table["runs"]] == [FLOAT32, "mpjax, bfloat16"]
    assert "DeepConvNet" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"workloads": "mpl"}, "must be some of mlp, convnet.*got 'mpl'"),
        ({"baselines": "("}, "not a regular expression"),
        ({"num_rounds": 0}, "num-rounds"),
        ({"max_minutes": 0.0}, "max-minutes"),
    ],
)
def test_bad_flags_are_reported(flags, message):
    with pytest.raises(ConfigError, match=message):
        speed.Config(**flags)


def test_a_pattern_found_nowhere_lists_the_baselines():
    with pytest.raises(ConfigError, match=r"no baseline of mlp.*mpjax, float32"):
        speed.choose(speed.all_baselines(), "mlp", "jaxamp")
