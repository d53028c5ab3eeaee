"""Batches on the device: whole epochs, exact resuming, no transfers."""

import functools
import itertools
import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.data.dataset import Dataset
from experiments.data.on_device import DeviceDataset
from experiments.harness.errors import ConfigError

SIZES = [(1, 1), (7, 3), (12, 4), (23, 5), (23, 100), (130, 64)]


@functools.cache
def numbered(num_examples: int, batch_size: int) -> DeviceDataset:
    """Example i has 1 x 2 pixels, i and 255 - i, and label i."""
    number = np.arange(num_examples, dtype=np.uint8)
    images = np.stack([number, 255 - number], axis=1).reshape(-1, 1, 2)
    return DeviceDataset(images, number, batch_size)


def take(batches, num: int) -> list[dict[str, np.ndarray]]:
    return [
        {name: np.asarray(value) for name, value in batch.items()}
        for batch in itertools.islice(batches, num)
    ]


def shuffled_from(data, seed: int, first_step: int):
    batches = data.shuffled(seed)
    batches.set_state({"num_batches": first_step})
    return batches


def labels_of(batches) -> list[int]:
    return [int(label) for b in batches for label in b["label"][b["mask"]]]


@pytest.mark.parametrize(("num_examples", "batch_size"), SIZES)
def test_every_epoch_has_each_example_once(num_examples, batch_size):
    data = numbered(num_examples, batch_size)
    batches = data.shuffled(3)
    orders = [labels_of(take(batches, data.num_batches)) for _ in range(3)]
    for order in orders:
        assert sorted(order) == list(range(num_examples))
    if num_examples > 2:
        assert len({tuple(order) for order in orders}) == 3, "an order came twice"


def test_seeds_give_different_orders_and_one_seed_the_same():
    data = numbered(23, 5)
    orders = [
        labels_of(take(data.shuffled(seed), data.num_batches)) for seed in (0, 1, 0)
    ]
    assert orders[0] == orders[2] != orders[1]


@pytest.mark.parametrize(("num_examples", "batch_size"), SIZES)
def test_image_label_and_mask_belong_together(num_examples, batch_size):
    data = numbered(num_examples, batch_size)
    for batch in take(data.shuffled(0), 2 * data.num_batches):
        np.testing.assert_allclose(
            batch["image"][:, 0, 0] * 255, batch["label"], rtol=1e-6
        )
        np.testing.assert_allclose(
            batch["image"][:, 0, 1] * 255, 255 - batch["label"], rtol=1e-6
        )


@settings(deadline=None, max_examples=60)
@given(
    size=st.sampled_from(SIZES),
    seed=st.integers(0, 2**31 - 1),
    first_step=st.integers(0, 60),
)
def test_resuming_gives_the_batches_that_skipping_gives(size, seed, first_step):
    data = numbered(*size)
    resumed = take(shuffled_from(data, seed, first_step), 4)
    skipped = take(data.shuffled(seed), first_step + 4)[first_step:]
    for a, b in zip(resumed, skipped, strict=True):
        assert a.keys() == b.keys() == {"image", "label", "mask"}
        for name in a:
            assert a[name].dtype == b[name].dtype
            assert a[name].tobytes() == b[name].tobytes(), name


def test_resuming_far_into_training():
    data = numbered(130, 64)
    far = take(shuffled_from(data, 0, 3_000_000), 3)
    assert sorted(labels_of(far)) == list(range(130))


def test_the_mask_is_false_for_padding_only():
    data = numbered(23, 5)
    masks = [batch["mask"].tolist() for batch in take(data.in_order(), 99)]
    assert masks == [[True] * 5] * 4 + [[True] * 3 + [False] * 2]
    assert [batch["mask"].sum() for batch in take(data.shuffled(0), 5)] == [5] * 4 + [3]


def test_in_order_is_one_epoch_in_the_order_of_the_data():
    data = numbered(23, 5)
    assert labels_of(take(data.in_order(), 99)) == list(range(23))
    assert len(list(data.in_order())) == data.num_batches == 5


def test_a_batch_no_larger_than_the_dataset():
    data = numbered(23, 100)
    assert (data.batch_size, data.num_batches, data.num_examples) == (23, 1, 23)
    (batch,) = take(data.in_order(), 99)
    assert batch["image"].shape == (23, 1, 2)
    assert batch["mask"].all()


def test_all_batches_have_one_shape_and_type():
    data = numbered(23, 5)
    for batch in take(data.shuffled(0), 12):
        assert {name: (x.shape, str(x.dtype)) for name, x in batch.items()} == {
            "image": ((5, 1, 2), "float32"),
            "label": ((5,), "int32"),
            "mask": ((5,), "bool"),
        }


def test_bytes_are_divided_by_255():
    images = np.arange(256, dtype=np.uint8)[:, None]
    (batch,) = take(DeviceDataset(images, np.zeros(256, int), 256).in_order(), 9)
    expected = np.arange(256, dtype=np.float32)[:, None] / np.float32(255)
    np.testing.assert_array_max_ulp(batch["image"], expected, maxulp=1)
    assert (batch["image"][0], batch["image"][255]) == (0, 1)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_floats_pass_as_they_are(dtype):
    images = np.random.default_rng(0).normal(size=(9, 2, 3)).astype(dtype)
    (batch,) = take(DeviceDataset(images, np.arange(9), 9).in_order(), 9)
    assert batch["image"].dtype == dtype
    assert batch["image"].tobytes() == images.tobytes()


def test_real_images_come_back(real_mnist):
    data = DeviceDataset(real_mnist.x_test, real_mnist.y_test, 1024)
    batches = take(data.in_order(), 99)
    images = np.concatenate([batch["image"][batch["mask"]] for batch in batches])
    assert np.array_equal(np.round(images * 255).astype(np.uint8), real_mnist.x_test)
    assert labels_of(batches) == real_mnist.y_test.tolist()


@pytest.mark.parametrize("first_step", [0, 3])
def test_iterating_moves_nothing_between_host_and_device(first_step):
    data = numbered(23, 5)
    batches = shuffled_from(data, 0, first_step)
    next(batches)  # what is set up once
    with jax.transfer_guard("disallow_explicit"):
        for _ in range(4 * data.num_batches):  # four new orders
            next(batches)


def test_evaluating_moves_nothing_between_host_and_device():
    batches = numbered(23, 5).in_order()
    next(batches)
    with jax.transfer_guard("disallow_explicit"):
        assert len(list(batches)) == 4


@pytest.mark.parametrize(("num_examples", "batch_size"), [(0, 5), (5, 0), (5, -1)])
def test_nothing_to_feed_is_explained(num_examples, batch_size):
    images = np.zeros((num_examples, 2, 2), np.uint8)
    with pytest.raises(
        ConfigError, match=r"at least one example.*choose another split"
    ):
        DeviceDataset(images, np.zeros(num_examples, int), batch_size)


def test_a_label_too_few_is_explained():
    with pytest.raises(ValueError, match="one label per image, got 4 for 5"):
        DeviceDataset(np.zeros((5, 2)), np.zeros(4, int), 2)


def test_it_is_a_dataset_whose_state_survives_json():
    batches = numbered(23, 5).shuffled(1)
    assert isinstance(batches, Dataset)
    take(batches, 7)
    state = json.loads(json.dumps(batches.get_state()))
    other = numbered(23, 5).shuffled(1)
    take(other, 2)
    other.set_state(state)
    assert_same(take(other, 9), take(batches, 9))
    batches.set_state({"num_batches": 0})
    assert_same(take(batches, 3), take(numbered(23, 5).shuffled(1), 3))


@pytest.mark.parametrize("state", [None, {}, {"num_batches": -1}, {"num_batches": "1"}])
def test_the_state_of_something_else_is_refused(state):
    with pytest.raises(ValueError, match=r"expected {'num_batches'"):
        numbered(23, 5).shuffled(0).set_state(state)


@pytest.mark.parametrize(("size", "count"), [((24, 6), 3), ((23, 6), 2), ((3, 3), 3)])
@pytest.mark.parametrize("first", [0, 3])
def test_shards_are_disjoint_and_together_the_batch(size, count, first):
    data = numbered(*size)
    whole = data.shuffled(2)
    take(whole, first)
    shards = [whole.shard(index, count) for index in range(count)]
    parts = [take(shard, 6) for shard in shards]
    joined = [
        {name: np.concatenate([part[name] for part in batch]) for name in batch[0]}
        for batch in zip(*parts, strict=True)
    ]
    assert_same(joined, take(whole, 6))
    assert len({json.dumps(shard.get_state()) for shard in shards}) == 1
    parts = [take(data.shard(index, count).in_order(), 99) for index in range(count)]
    epoch = [labels_of(batch) for batch in zip(*parts, strict=True)]
    assert list(itertools.chain(*epoch)) == list(range(size[0]))


def test_a_shard_of_a_shard_and_the_state_of_another_count():
    whole = numbered(24, 8).shuffled(0)
    part = whole.shard(1, 2).shard(0, 2)
    expected = [{k: v[4:6] for k, v in batch.items()} for batch in take(whole, 5)]
    assert_same(take(part, 5), expected)
    part.set_state(whole.get_state())
    (batch,) = take(whole, 1)
    assert_same(take(part, 1), [{k: v[4:6] for k, v in batch.items()}])


@pytest.mark.parametrize(("index", "count"), [(2, 2), (-1, 2), (0, 0), (1, 1)])
def test_an_index_outside_the_shards_is_refused(index, count):
    with pytest.raises(ValueError, match="expected an index from 0 to count - 1"):
        numbered(24, 8).shuffled(0).shard(index, count)


def test_a_batch_that_cannot_be_shared_equally_is_refused():
    with pytest.raises(ConfigError, match=r"3 processes .* multiple of 3"):
        numbered(24, 8).shuffled(0).shard(0, 3)


def assert_same(batches, expected):
    for a, b in zip(batches, expected, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert value.dtype == b[name].dtype
            np.testing.assert_array_equal(value, b[name], err_msg=name)
