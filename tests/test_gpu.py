"""What other tests assert on a CPU, on a GPU, and that XLA computes in half there.

pytest -m gpu -n0 tests/test_gpu.py
"""

import jax
import pytest
from helpers.tools import regression_batch
from test_train import (  # noqa: F401 - collected here, under the mark
    test_float32_step_is_the_hand_written_one,
    test_microbatches_give_the_whole_batch_gradient,
    test_minus_zero_stays_minus_zero,
    test_nothing_moves_on_an_overflow,
    test_nothing_moves_under_scan,
)
from test_train_compiled import (
    mlp,
    test_nothing_crosses_between_host_and_device,  # noqa: F401
    test_the_compiled_step_calls_no_host,  # noqa: F401
    test_the_step_is_traced_once,  # noqa: F401
)

from experiments.models import small

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU"),
]


@pytest.fixture(autouse=True)
def highest_precision():
    """float32 means float32: by default Ampere and later multiply in TF32."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.parametrize(
    ("policy", "dtype"), [("mixed_float16", "f16"), ("mixed_bfloat16", "bf16")]
)
def test_matmuls_stay_half_when_compiled(policy, dtype):
    state, step = mlp(policy)
    text = step.lower(state, regression_batch(128)).compile().as_text()
    matmuls = [line for line in text.splitlines() if " dot(" in line or "gemm" in line]
    assert any(f"{dtype}[" in line for line in matmuls)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("name", small.CASES)
def test_autocast_gradients_are_no_worse_than_hand_cast(name, policy):
    case = small.CASES[name]()
    dtype, scale = (
        ("float16", 2.0**10) if policy == "mixed_float16" else ("bfloat16", 1)
    )
    args = (case.params, case.inputs)
    by_hand = small.gradient(small.hand_cast(case.loss, dtype), *args, scale=scale)
    cast = small.autocast_gradient(case.loss, *args, policy, scale=scale)
    truth = small.oracle(case)
    error = small.relative_error(cast, truth)
    # On a CPU 1.02 in the mean over seeds; a GPU rounds its sums in another order.
    assert 1e-5 < error <= 1.25 * small.relative_error(by_hand, truth)
