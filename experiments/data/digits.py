"""The 1797 digits of scikit-learn in the format of MNIST; they need no network."""

import numpy as np

from experiments.harness.errors import DataError

NUM_TEST = 297


def load() -> dict[str, np.ndarray]:
    """Returns 1500 training and 297 test digits, zoomed from 8x8 to 20x20 in 28x28.

    Returns:
      x_train, y_train, x_test, y_test; uint8, as in `ImageDataset`.

    Raises:
      DataError: if scikit-learn is not installed.
    """
    try:
        from scipy import ndimage
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            f"--dataset digits needs scikit-learn ({error}): pip install scikit-learn."
        ) from error
    pixels, labels = map(np.asarray, load_digits(return_X_y=True))
    images = pixels.reshape(-1, 8, 8)
    zoomed = np.asarray(ndimage.zoom(images, (1, 2.5, 2.5), order=1))
    pixels = np.clip(np.round(zoomed * (255 / 16)), 0, 255).astype(np.uint8)
    x = np.pad(pixels, ((0, 0), (4, 4), (4, 4)))
    y = labels.astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(x))
    train, test = order[:-NUM_TEST], order[-NUM_TEST:]
    return {
        "x_train": x[train],
        "y_train": y[train],
        "x_test": x[test],
        "y_test": y[test],
    }
