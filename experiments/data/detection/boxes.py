"""Boxes in two forms, and how much they overlap.

A box is four numbers, such as shares of the image's width and height. Corners are
(left, top, right, bottom); centers are (x, y, width, height).
"""

import jax
import jax.numpy as jnp


def to_corners(centers: jax.Array) -> jax.Array:
    """Returns boxes (..., 4) as corners."""
    position, size = jnp.split(centers, 2, axis=-1)
    return jnp.concatenate([position - size / 2, position + size / 2], axis=-1)


def to_centers(corners: jax.Array) -> jax.Array:
    """Returns boxes (..., 4) as centers."""
    start, stop = jnp.split(corners, 2, axis=-1)
    return jnp.concatenate([(start + stop) / 2, stop - start], axis=-1)


def areas(corners: jax.Array) -> jax.Array:
    """Returns the areas (...) of boxes (..., 4); 0 where a corner is past the other."""
    start, stop = jnp.split(corners, 2, axis=-1)
    return jnp.prod(jnp.maximum(stop - start, 0), axis=-1)


def intersections(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the areas (A, B) that boxes (A, 4) and (B, 4), as corners, share."""
    start = jnp.maximum(a[:, None, :2], b[None, :, :2])
    stop = jnp.minimum(a[:, None, 2:], b[None, :, 2:])
    return jnp.prod(jnp.maximum(stop - start, 0), axis=-1)


def overlaps(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns intersection over union (A, B) of boxes (A, 4) and (B, 4), as corners.

    That is 0 where both boxes have no area.

    >>> overlaps(jnp.array([[0, 0, 2, 2.0]]), jnp.array([[1, 0, 3, 2.0]])).round(3)
    Array([[0.333]], dtype=float32)
    """
    shared = intersections(a, b)
    union = areas(a)[:, None] + areas(b)[None] - shared
    return jnp.where(union > 0, shared / jnp.where(union > 0, union, 1), 0)
