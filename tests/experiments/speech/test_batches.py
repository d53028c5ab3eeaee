"""Batches of utterances: shapes, order, resumption, shards."""

import itertools
import json

import numpy as np
import pytest

from experiments.data.dataset import Dataset
from experiments.data.speech.batches import Example, SpeechBatches
from experiments.harness.errors import ConfigError, DataError

NUM_FEATURES = 3
LENGTHS = np.random.default_rng(0).integers(10, 90, 23)
EXAMPLES = [
    Example(int(length), np.arange(1, 2 + length // 20, dtype=np.int32))
    for length in LENGTHS
]


def features(index, rng):
    """The index of the utterance in every frame, and noise beside it."""
    x = np.full((LENGTHS[index], NUM_FEATURES), index + 1, np.float32)
    if rng is not None:
        x[:, 1] = rng.normal(size=len(x))
    return x


def make(**options):
    settings = {"num_features": NUM_FEATURES, "batch_size": 4, "seed": 7, **options}
    return SpeechBatches(EXAMPLES, features, **settings)


def take(batches, num):
    return list(itertools.islice(batches, num))


def assert_equal(a, b):
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            np.testing.assert_array_equal(x[name], y[name])


def indices(batch):
    """The utterances of a batch, without padding rows."""
    present = batch["num_frames"] > 0
    return [int(i) - 1 for i in batch["features"][present, 0, 0]]


def all_indices(batches):
    return [index for batch in batches for index in indices(batch)]


def test_every_utterance_is_in_an_epoch_once_with_its_own_frames_and_labels():
    batches = make()
    assert isinstance(batches, Dataset)
    for epoch in (0, 1):
        rows = take(batches, batches.num_batches)
        assert sorted(all_indices(rows)) == list(range(len(LENGTHS))), epoch
    for batch in rows:
        for row, index in enumerate(indices(batch)):
            num_frames = batch["num_frames"][row]
            assert num_frames == LENGTHS[index]
            assert (batch["features"][row, :num_frames, 0] == index + 1).all()
            assert (batch["features"][row, num_frames:] == 0).all()
            num_labels = batch["num_labels"][row]
            np.testing.assert_array_equal(
                batch["labels"][row],
                np.pad(EXAMPLES[index].labels, (0, 99))[: batch["labels"].shape[1]],
            )
            assert num_labels == len(EXAMPLES[index].labels)


def test_a_shape_per_bucket_and_no_more_padding_than_its_longest_utterance():
    batches = make(num_buckets=3)
    shapes = {b["features"].shape for b in take(batches, batches.num_batches)}
    assert len(shapes) == 3
    for bucket in batches.buckets:
        longest = LENGTHS[bucket.indices].max()
        assert longest <= bucket.num_frames < longest + 8
    assert [b.num_frames for b in batches.buckets] == sorted(s[1] for s in shapes)


def test_epochs_differ_and_the_seed_decides():
    first = take(make(), 12)
    assert_equal(first, take(make(), 12))
    other = take(make(seed=8), 12)
    assert [indices(b) for b in first] != [indices(b) for b in other]
    assert [indices(b) for b in first[:6]] != [indices(b) for b in first[6:]]


@pytest.mark.parametrize("position", [0, 1, 5, 9])
def test_it_goes_on_bitwise_from_its_state(position):
    whole = take(make(), 14)
    batches = make()
    take(batches, position)
    state = json.loads(json.dumps(batches.get_state()))
    assert state == {"num_batches": position}
    resumed = make()
    take(resumed, 2)
    resumed.set_state(state)
    assert_equal(take(resumed, 14 - position), whole[position:])


@pytest.mark.slow
def test_worker_processes_give_the_same_batches():
    assert_equal(take(make(num_workers=1), 8), take(make(), 8))


def test_shards_together_are_the_whole_batch():
    whole, batches = take(make(), 8), make()
    parts = [take(batches.shard(index, 2), 8) for index in range(2)]
    for batch, *rows in zip(whole, *parts, strict=True):
        for name, values in batch.items():
            joined = np.concatenate([part[name] for part in rows])
            np.testing.assert_array_equal(joined, values)


def test_a_shard_begins_where_its_data_set_is():
    batches = make()
    take(batches, 3)
    assert batches.shard(1, 2).get_state() == {"num_batches": 3}


def test_the_first_epoch_may_go_from_short_to_long():
    batches = make(sort_first_epoch=True)
    order = all_indices(take(batches, batches.num_batches))
    lengths = LENGTHS[order]
    assert (np.diff(lengths) >= 0).all()
    order = all_indices(take(batches, batches.num_batches))
    assert (np.diff(LENGTHS[order]) < 0).any()


def test_evaluation_has_no_augmentation_and_sees_everything():
    rows = list(make().in_order())
    assert sorted(all_indices(rows)) == list(range(len(LENGTHS)))
    assert all((b["features"][..., 1] == b["features"][..., 0]).all() for b in rows)


def test_what_cannot_be_is_refused():
    with pytest.raises(DataError, match="no utterance"):
        SpeechBatches([], features, num_features=1, batch_size=4, seed=0)
    with pytest.raises(ConfigError, match="multiple of 3 for --batch-size"):
        make().shard(0, 3)
    with pytest.raises(ValueError, match="num_batches"):
        make().set_state({"epoch": 3})
    with pytest.raises(ValueError, match="index"):
        make().shard(2, 2)
    longer = SpeechBatches(
        [Example(4, np.array([1]))],
        lambda index, rng: np.zeros((9, 1), np.float32),
        num_features=1,
        batch_size=1,
        seed=0,
    )
    with pytest.raises(DataError, match="9 frames, more than the 8"):
        list(longer.in_order())
