"""Memory and traffic of real models under autocast, compiled for an H100.

They are compared with the same models in half by hand; no GPU is needed.
"""

import pytest
from helpers.tools import thinned

from experiments.benchmarks._memory_by_hand import measure
from experiments.benchmarks.real_models import REAL_MODELS

pytestmark = pytest.mark.h100


LIMIT = {"temporaries": 1.02, "moved": 1.05}
# Three rules cost memory by design: arguments of `full_precision` are not rounded (the
# router of the experts); the gradient of a nearest resize, a scatter, adds up in
# float32; and a loop in float16, which has less range, saves its residuals as traced.
FULL_LIMITS = {
    "unet": {"temporaries": 1.04},
    "moe_dense": {"temporaries": 1.04},
}
FLOAT16_LIMITS = {
    "gpt2_scan_remat": {"temporaries": 1.07},
    "deep_speech2": {"temporaries": 1.1},
}
# In small models, arrays that do not grow with the model weigh more: logits, one-hot
# arrays, gates.
SMALL_LIMITS = {
    "unet": {"temporaries": 1.05},
    "gpt2": {"temporaries": 1.06},
    "deep_speech2": {"temporaries": 1.09},
    "moe_dense": {"temporaries": 1.09},
    "moe_ragged": {"temporaries": 1.1, "moved": 1.12},
}


@pytest.mark.parametrize("name", thinned(REAL_MODELS, 6, rest="weekly"))
def test_small_models_take_what_bfloat16_by_hand_takes(name):
    check(name, "small", "bfloat16")


@pytest.mark.weekly
@pytest.mark.parametrize("name", REAL_MODELS)
def test_small_models_take_what_float16_by_hand_takes(name):
    check(name, "small", "float16")


@pytest.mark.weekly
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", REAL_MODELS)
def test_full_models_take_what_half_by_hand_takes(name, dtype):
    check(name, "full", dtype)


def check(name, size, dtype):
    steps = (f"by hand, {dtype}", f"mixed_{dtype}")
    by_hand, cast = measure(name, REAL_MODELS[name](size), "h100", steps)
    limits = LIMIT | (FULL_LIMITS if size == "full" else SMALL_LIMITS).get(name, {})
    if dtype == "float16":
        limits |= FLOAT16_LIMITS.get(name, {})
    for key, limit in limits.items():
        assert by_hand[f"{key}_to_by_hand"] == 1
        assert cast[f"{key}_to_by_hand"] <= limit
