"""Augmentation of images with boxes, in jit: arXiv:1512.02325, sections 2.2 and 3.6.

S denotes the side of an image, C its channels, M objects, padding included. Pixels are
from 0 to 1, boxes are corners in shares of the image.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments.data.detection.boxes import overlaps

_NUM_WINDOWS = 32  # that are tried for a crop
_MIN_SIDE, _MAX_RATIO = 0.3, 2.0  # of a crop, in shares of the image; width by height
_MAX_EXPANSION = 4.0
# The overlap with an object that a crop has at least; any crop is right for 0.
_MIN_OVERLAPS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)


class Augmentation(NamedTuple):
    """What is done to training images; nothing by default.

    Attributes:
      photometric: whether brightness, contrast and, in colour, saturation vary.
      crop: whether a part of the image is enlarged, or the image becomes a part of a
        larger, grey one.
      flip: whether half of the images are mirrored.
    """

    photometric: bool = False
    crop: bool = False
    flip: bool = False


class Sample(NamedTuple):
    """An image and its objects.

    Attributes:
      image: (S, S, C).
      boxes: (M, 4).
      mask: bool (M,), False for padding, and for what a crop has cut off.
    """

    image: jax.Array
    boxes: jax.Array
    mask: jax.Array


def augment(key: jax.Array, sample: Sample, augmentation: Augmentation) -> Sample:
    """Returns an image changed at random, and its objects."""
    photometric_key, crop_key, flip_key = jax.random.split(key, 3)
    if augmentation.photometric:
        image = distort(photometric_key, sample.image)
        sample = sample._replace(image=image)
    if augmentation.crop:
        sample = crop(sample, choose_window(crop_key, sample))
    if augmentation.flip:
        flipped = flip(sample)
        is_flipped = jax.random.bernoulli(flip_key)
        sample = jax.tree.map(functools.partial(jnp.where, is_flipped), flipped, sample)
    return sample


def distort(key: jax.Array, image: jax.Array) -> jax.Array:
    """Varies brightness, contrast and saturation, each in half of the images."""
    keys = jax.random.split(key, 6)
    use = [jax.random.bernoulli(k) for k in keys[:3]]
    shift = jax.random.uniform(keys[3], minval=-32 / 255, maxval=32 / 255)
    factors = [jax.random.uniform(k, minval=0.5, maxval=1.5) for k in keys[4:]]
    image = image + jnp.where(use[0], shift, 0)
    image = image * jnp.where(use[1], factors[0], 1)
    gray = jnp.mean(image, axis=-1, keepdims=True)  # an image without colour has it all
    image = gray + (image - gray) * jnp.where(use[2], factors[1], 1)
    return jnp.clip(image, 0, 1)


def flip(sample: Sample) -> Sample:
    """Returns the mirror image."""
    left, top, right, bottom = jnp.moveaxis(sample.boxes, -1, 0)
    boxes = jnp.stack([1 - right, top, 1 - left, bottom], axis=-1)
    return Sample(sample.image[:, ::-1], boxes, sample.mask)


def choose_window(key: jax.Array, sample: Sample) -> jax.Array:
    """Returns what is to fill the image, as corners (4,) in shares of the image.

    In equal parts that is the whole, a larger window, or one within, which overlaps
    an object by a least amount, itself at random; the whole, where none is found.
    """
    keys = jax.random.split(key, 4)
    whole = jnp.array([0.0, 0.0, 1.0, 1.0])
    windows = _random_windows(keys[0])
    least = jax.random.choice(keys[1], jnp.array(_MIN_OVERLAPS))
    shares = jnp.where(sample.mask, overlaps(windows, sample.boxes), 0)
    is_valid = jnp.max(shares, axis=1) >= least
    first = windows[jnp.argmax(is_valid)]
    inner = jnp.where(jnp.any(is_valid), first, whole)
    side = jax.random.uniform(keys[2], minval=1, maxval=_MAX_EXPANSION)
    place_key, kind_key = jax.random.split(keys[3])
    start = -(side - 1) * jax.random.uniform(place_key, (2,))
    outer = jnp.concatenate([start, start + side])
    kind = jax.random.randint(kind_key, (), 0, 3)
    return jnp.stack([whole, outer, inner])[kind]


def crop(sample: Sample, window: jax.Array) -> Sample:
    """Returns what a window of the image shows, enlarged or reduced to the same size.

    Beyond the image it is grey, the mean of the image. An object is kept if its center
    lies in the window, and its box is cut off at the window's edges.

    Args:
      sample: the image and its objects.
      window: corners (4,), in shares of the image, possibly beyond it.
    """
    start, size = window[:2], window[2:] - window[:2]
    mean = jnp.mean(sample.image, axis=(0, 1))
    scale = (1 / size)[::-1]  # rows first
    translation = (-start / size)[::-1] * sample.image.shape[0]
    image = mean + jax.image.scale_and_translate(
        sample.image - mean,
        sample.image.shape,
        (0, 1),
        scale,
        translation,
        method="linear",
        antialias=False,
    )
    centers = (sample.boxes[:, :2] + sample.boxes[:, 2:]) / 2
    is_inside = jnp.all((centers >= window[:2]) & (centers <= window[2:]), axis=-1)
    moved = (sample.boxes - jnp.tile(start, 2)) / jnp.tile(size, 2)
    return Sample(image, jnp.clip(moved, 0, 1), sample.mask & is_inside)


def _random_windows(key: jax.Array) -> jax.Array:
    """Returns windows within the image, of different sizes and shapes (n, 4)."""
    size_key, ratio_key, place_key = jax.random.split(key, 3)
    shape = (_NUM_WINDOWS,)
    area_side = jax.random.uniform(size_key, shape, minval=_MIN_SIDE, maxval=1)
    limit = jnp.log(_MAX_RATIO) / 2
    root = jnp.exp(jax.random.uniform(ratio_key, shape, minval=-limit, maxval=limit))
    sizes = jnp.minimum(jnp.stack([area_side * root, area_side / root], axis=-1), 1)
    start = (1 - sizes) * jax.random.uniform(place_key, (*shape, 2))
    return jnp.concatenate([start, start + sizes], axis=-1)
