"""scikit-learn's digits, which are not MNIST."""

import sys

import numpy as np
import pytest

from experiments.data import digits, mnist
from experiments.harness.errors import DataError

NAMES = ("x_train", "y_train", "x_test", "y_test")


def test_digits_are_small_and_named_so(fresh, no_network):
    dataset = mnist.load("digits")
    assert (dataset.name, dataset.source) == ("digits", "scikit-learn")
    assert dataset.x_train.shape == (1500, 28, 28)
    assert dataset.x_test.shape == (297, 28, 28)
    assert dataset.y_train.shape == (1500,)
    assert dataset.y_test.shape == (297,)
    assert {getattr(dataset, name).dtype for name in NAMES} == {np.dtype("u1")}
    labels = np.concatenate([dataset.y_train, dataset.y_test])
    counts = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert np.bincount(labels).tolist() == counts
    assert np.bincount(dataset.y_test).min() > 15, "a class is hardly tested"
    assert not fresh.exists(), "digits need no cache"


def test_digits_look_like_mnist():
    arrays = digits.load()
    for x in (arrays["x_train"], arrays["x_test"]):
        border = x.copy()
        border[:, 4:24, 4:24] = 0
        assert not border.any()
        assert (x.min(), x.max()) == (0, 255)
        assert 20 < x.mean() < 60  # MNIST: 33


def test_no_digit_is_in_both_training_and_test():
    arrays = digits.load()
    train = {image.tobytes() for image in arrays["x_train"]}
    test = {image.tobytes() for image in arrays["x_test"]}
    assert not train & test
    again = digits.load()
    assert all(np.array_equal(arrays[name], again[name]) for name in NAMES)


def test_digits_without_scikit_learn_are_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(
        DataError, match=r"needs scikit-learn.*pip install scikit-learn"
    ):
        mnist.load("digits")
