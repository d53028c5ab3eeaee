"""Weights survive the file bitwise, and the error of a bad file says why."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments.harness.weights import WeightsError, read_weights, write_weights

PARAMS = {
    "Conv_0": {"kernel": jnp.arange(18, dtype=jnp.float32).reshape(3, 3, 1, 2) / 7},
    "Dense_0": {"kernel": -jnp.ones((2, 3)) / 3, "bias": jnp.float32([1, 1e-40, 3])},
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "w.safetensors"
    write_weights(path, PARAMS, architecture="Tiny")
    return path


def test_what_is_read_is_what_was_written(file):
    got = read_weights(file, jax.eval_shape(lambda: PARAMS))
    assert jax.tree.structure(got) == jax.tree.structure(PARAMS)
    for ours, theirs in zip(*map(jax.tree.leaves, (got, PARAMS)), strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_array_equal(
            ours.view(np.uint32), np.asarray(theirs).view(np.uint32)
        )


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_parameters_are_kept_in_float32(tmp_path, dtype):
    path = tmp_path / "w.safetensors"
    half = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    write_weights(path, half, architecture="Tiny")
    for ours, theirs in zip(
        *map(jax.tree.leaves, (read_weights(path, PARAMS), half)), strict=True
    ):
        np.testing.assert_array_equal(ours, np.asarray(theirs, np.float32))


def test_the_file_names_its_architecture_and_any_reader_reads_it(file):
    header = file.read_bytes()
    size = int.from_bytes(header[:8], "little")
    metadata = json.loads(header[8 : 8 + size])["__metadata__"]
    assert metadata["architecture"] == "Tiny"
    names = {"Conv_0.kernel", "Dense_0.kernel", "Dense_0.bias"}
    assert load_file(file).keys() == names


def test_a_file_of_another_program_without_a_checksum_is_read(file):
    save_file(load_file(file), file)
    assert read_weights(file, PARAMS)["Dense_0"]["bias"][2] == 3


def changed(change):
    def write(path):
        arrays = load_file(path)
        change(arrays)
        save_file(arrays, path, {"architecture": "Other"})

    return write


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


def no_file(path):
    path.unlink()


def a_directory(path):
    path.unlink()
    path.mkdir()


KERNEL = "Dense_0.kernel"
CASES = {
    "shape": (
        changed(lambda a: a.update({KERNEL: np.ones((3, 2), np.float32)})),
        f"there: Other): {KERNEL} is F32 (3, 2) there, expected F32 (2, 3)",
    ),
    "dtype": (
        changed(lambda a: a.update({KERNEL: a[KERNEL].astype(np.float16)})),
        f"{KERNEL} is F16 (2, 3) there, expected F32 (2, 3)",
    ),
    "missing": (changed(lambda a: a.pop(KERNEL)), f"{KERNEL} is absent there"),
    "further": (
        changed(lambda a: a.update(more=np.ones(1, np.float32))),
        "more is F32 (1,) there, expected absent",
    ),
    "many": (
        changed(lambda a: a.update({str(i): np.ones(1, np.float32) for i in range(9)})),
        "2 is F32 (1,) there, expected absent; and 6 more",
    ),
    "cut": (
        lambda p: p.write_bytes(p.read_bytes()[:-5]),
        "not a whole safetensors file",
    ),
    "empty": (lambda p: p.write_bytes(b""), "not a whole safetensors file"),
    "text": (lambda p: p.write_text("weights" * 99), "not a whole safetensors file"),
    "bit": (flip_a_bit, "its content does not match its checksum"),
    "absent": (no_file, "cannot read the weights in"),
    "directory": (a_directory, "cannot read the weights in"),
}


@pytest.mark.parametrize(("damage", "words"), CASES.values(), ids=CASES)
def test_the_error_of_a_bad_file_says_why(file, damage, words):
    damage(file)
    with pytest.raises(WeightsError) as error:
        read_weights(file, PARAMS)
    text = str(error.value)
    assert words in text
    assert str(file) in text
    assert "\n" not in text


def test_a_failed_write_keeps_the_file_that_was_there(file, monkeypatch):
    before = file.read_bytes()

    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr(type(file), "write_bytes", fail)
    with pytest.raises(OSError, match="no space"):
        write_weights(file, PARAMS, architecture="Tiny")
    assert file.read_bytes() == before
    assert [*file.parent.iterdir()] == [file]
