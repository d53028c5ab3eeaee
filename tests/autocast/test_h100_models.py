"""Memory and traffic of real models under autocast, compiled for an H100.

They are compared with the same models in half by hand; no GPU is needed.
"""

import pytest
from helpers.tools import thinned

from experiments.benchmarks._memory_by_hand import measure
from experiments.benchmarks.real_models import REAL_MODELS

pytestmark = pytest.mark.h100


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
    assert by_hand["temporaries_to_by_hand"] == by_hand["moved_to_by_hand"] == 1
    assert cast["temporaries_to_by_hand"] <= 1.02
    assert cast["moved_to_by_hand"] <= 1.05
