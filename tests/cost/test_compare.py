"""The table of costs per policy, and the largest batch that fits."""

import jax
import pytest
from cost.test_analyze import full, mlp_step

from mpjax import cost
from mpjax.cost._compare import resized
from mpjax.cost._compile import compile_for, peak_bytes

DEVICE = cost.Device(
    "small",
    memory_bytes=4_000_000,
    bandwidth_bytes_per_s=1e9,
    peak_flops_per_s={"float32": 1e9, "float16": 1e10},
)
POLICIES = ["float32", "mixed_float16"]


@pytest.fixture(scope="module")
def costs():
    return cost.compare(mlp_step, POLICIES, device=DEVICE)


def test_half_takes_the_matmuls_and_the_time(costs):
    assert list(costs.reports) == POLICIES
    assert set(costs.batch_sizes.values()) == {64}
    full_precision, half = costs.reports.values()
    assert half.compute_s < full_precision.compute_s / 4
    rows = str(costs).splitlines()
    assert rows[0] == "small, 75 % of its memory usable"
    assert "100 %" in rows[-1]
    assert "1.00" in rows[-2]


@pytest.mark.parametrize("policy", POLICIES)
def test_the_largest_batch_fits_and_no_much_larger_one_does(costs, policy):
    largest = costs.largest_batch[policy]
    step, state, batch = mlp_step(policy)

    def peak(size):
        return peak_bytes(compile_for(DEVICE, step, state, resized(batch, size)))

    assert peak(largest) <= 0.75 * DEVICE.memory_bytes < peak(int(1.1 * largest))


def test_a_batch_that_never_fits():
    costs = cost.compare(mlp_step, ["float32"], device=cost.Device("tiny", 10_000))
    assert costs.largest_batch == {"float32": 0}


def test_without_the_devices_memory_there_is_no_largest_batch(capsys):
    costs = cost.compare(mlp_step, ["float32"], device=cost.Device("unknown"))
    assert costs.largest_batch == {"float32": None}
    costs.print()
    assert capsys.readouterr().out == f"{costs}\n"
    assert costs.to_dict()["policies"]["float32"]["largest_batch"] is None


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="policies is empty"):
        cost.compare(mlp_step, [])
    with pytest.raises(ValueError, match="memory_fraction=0 must be"):
        cost.compare(mlp_step, POLICIES, memory_fraction=0)
    with pytest.raises(ValueError, match="examples along axis 0"):
        cost.compare(lambda _: (jax.numpy.add, full(8), full()), POLICIES)
    sizes = iter((8, 16))
    with pytest.raises(ValueError, match=r"different sizes: \[8, 16\]"):
        cost.compare(lambda _: (abs, full(next(sizes))), POLICIES)
