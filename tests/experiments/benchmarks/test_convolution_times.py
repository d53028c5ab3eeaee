"""Convolutions as matmuls, and the table of their times."""

import jax
import numpy as np
import pytest

from experiments.benchmarks import convolutions
from experiments.harness.errors import ConfigError
from experiments.harness.files import read_json


def test_matmuls_and_gradients_give_what_the_convolution_does():
    generator = np.random.default_rng(0)
    x = generator.standard_normal((2, 5, 5, 3), np.float32)
    w = generator.standard_normal((3, 3, 3, 4), np.float32)
    g = generator.standard_normal((2, 5, 5, 4), np.float32)
    expected, pullback = jax.vjp(convolutions.convolve, x, w)
    images, kernel = pullback(g)
    for suffix in ("", "_as_matmul"):
        forms = [
            getattr(convolutions, f"{name}{suffix}")
            for name in ("convolve", "images_gradient", "kernel_gradient")
        ]
        actual = forms[0](x, w), forms[1](g, w), forms[2](x, g)
        for a, e in zip(actual, (expected, images, kernel), strict=True):
            np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5)


def test_it_leaves_a_table_of_times_and_of_the_dtypes_that_ran(tmp_path, capsys):
    output = tmp_path / "convolutions.json"
    config = convolutions.Config(
        num_channels=(4,), batch_size=2, image_size=6, num_rounds=3, output=output
    )
    table = convolutions.main(config)
    assert read_json(output) == table
    rows = {(row["what"], row["form"]): row for row in table["runs"]}
    assert list(rows) == list(convolutions.FORMS)
    for (_, form), row in rows.items():
        assert row["computed_in"] in ("f32", "bf16")
        if form == convolutions.FLOAT32:
            assert (row["computed_in"], row["ratio"]) == ("f32", 1)
    assert "2 images of 6 x 6" in capsys.readouterr().out


def test_a_program_without_a_product_is_refused():
    with pytest.raises(ValueError, match="no convolution and no matmul"):
        convolutions.operand_dtype("ROOT %add.1 = f32[2] add(%a, %b)")


def test_bad_flags_are_reported():
    with pytest.raises(ConfigError, match=r"--num-channels must be 1 or more"):
        convolutions.Config(num_channels=(0,))
