"""Repeated augmentation: which samples come again where, and that their views differ."""

import numpy as np
import pytest
import torch

from bigbatch.configs.augment import Augment, Crop
from bigbatch.configs.errors import UserError
from bigbatch.configs.load import load_recipe
from bigbatch.data.augment.pipeline import Augmenter
from bigbatch.data.order import build_order
from bigbatch.data.repeats import RepeatedOrder
from tests.data.test_order import CLASS_QUOTAS, index_of, sampling
from tests.helpers.micro_batches import BALANCED, SIZE, all_ranks, batches_of, by_place, content

COUNTS = (21, 7, 30)
CPU = torch.device("cpu")


def repeated(policy="uniform", repeats=3, micro_batch=4, seed=0):
    order = build_order(sampling(policy), index_of(COUNTS), seed)
    return order, RepeatedOrder(order, repeats, micro_batch)


@pytest.mark.parametrize("policy", ["uniform", *CLASS_QUOTAS])
@pytest.mark.parametrize("repeats", [2, 3])
def test_every_micro_batch_comes_several_times_in_a_row(policy, repeats):
    order, again = repeated(policy, repeats)
    once = order.samples(np.arange(400)).reshape(-1, 4)
    assert np.array_equal(
        again.samples(np.arange(400 * repeats)).reshape(-1, 4), once.repeat(repeats, axis=0)
    )
    # However it is asked: one position, or any of them in any order.
    places = np.random.default_rng(0).permutation(400)
    assert np.array_equal(again.samples(places), again.samples(np.arange(400))[places])


def test_an_epoch_keeps_its_images_and_several_hold_each_sample_so_often():
    order, again = repeated(repeats=4, micro_batch=2)  # 58 samples: 29 micro-batches
    size = again.epoch_samples
    assert size == order.epoch_samples == sum(COUNTS)
    positions = np.arange(8 * size)
    counts = np.bincount(again.samples(positions[: 4 * size]), minlength=size)
    assert (counts == 4).all()
    assert len(np.unique(again.samples(positions[:size]))) == -(-29 // 4) * 2
    assert np.array_equal(again.epochs(positions), positions // size)


def test_no_micro_batch_holds_a_sample_twice():
    _, again = repeated(repeats=3, micro_batch=6)
    batches = again.samples(np.arange(54)).reshape(-1, 6)  # of the first epoch of samples
    assert all(len(set(batch)) == 6 for batch in batches.tolist())


def test_all_views_of_a_bad_sample_get_one_substitute():
    order, again = repeated(repeats=3, micro_batch=4)
    sample = int(again.samples(np.array([13]))[0])
    assert [int(s) for s in again.samples(np.array([13, 17, 21]))] == [sample] * 3
    found = {again.substitute(sample, position, 0) for position in (13, 17, 21)}
    assert found == {order.substitute(sample, 5, 0)}


def test_the_hash_names_the_repeats():
    hashes = {repeated()[0].hash, repeated()[1].hash, repeated(repeats=2)[1].hash}
    assert len(hashes | {repeated(micro_batch=5)[1].hash}) == 4


def test_micro_batches_depend_on_neither_world_workers_nor_start(index):
    def order():
        return RepeatedOrder(build_order(BALANCED, index, 5), 3, 4)

    expected = by_place(batches_of(index, order=order()))
    assert expected[0, 0] == expected[0, 1] == expected[0, 2] != expected[0, 3]
    # Of 8 micro-batches in a step, the last two and the first of the next one are alike.
    assert expected[0, 6] == expected[0, 7] == expected[1, 0] != expected[1, 1]
    assert all_ranks(index, 3, order=order()) == expected
    assert by_place(batches_of(index, order=order(), workers=2)) == expected
    later = batches_of(index, order=order(), start_step=1)
    assert {(b.step, b.index): content(b) for b in later}.items() <= expected.items()


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["data.repeats=9"], "data.repeats = 9, and a step has 4 micro-batches"),
        (["data.lanes=2"], r"data.repeats = 2 does not go with data.lanes, .* set data.repeats"),
        (["data.stream=[a.tar]", "duration=9 steps"], "does not go with data.stream"),
        (["data.sampling={name: progressive, epochs: 3}"], "does not go with data.sampling, prog"),
    ],
)
def test_what_cannot_be_repeated_is_refused(overrides, says):
    with pytest.raises(UserError, match=says):
        load_recipe("digits", ["data.repeats=2", "micro_batch=64", *overrides])


def test_each_view_is_another_one(index):
    order = RepeatedOrder(build_order(BALANCED, index, 5), 2, 4)
    augmenter = Augmenter(
        Augment(crop=Crop(), flip=0.5),
        image_size=SIZE, crop_fraction=1.0, classes=3, seed=1, device=CPU,
    )  # fmt: skip
    first, second, *_ = batches_of(index, order=order)
    assert np.array_equal(first.samples, second.samples)
    a, b = augmenter.images(first).clone(), augmenter.images(second)
    assert all(not torch.equal(x, y) for x, y in zip(a, b, strict=True))
