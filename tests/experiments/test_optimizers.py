"""Learning rates and optimizers of the experiments."""

import numpy as np

from experiments.models.optimizers import one_cycle


def test_the_learning_rate_rises_then_falls_to_zero():
    rates = [float(one_cycle(1e-2, 20)(step)) for step in range(21)]
    assert np.argmax(rates) == 2
    np.testing.assert_allclose(rates[:3], [0, 0.5e-2, 1e-2], rtol=1e-6)
    assert np.all(np.diff(rates[2:]) < 0)
    np.testing.assert_allclose(rates[20], 0, atol=1e-9)
    # The cosine is half way down in the middle of its fall.
    np.testing.assert_allclose(rates[11], 0.5e-2, rtol=1e-5)
