"""Layers put together on one rank each: every value comes back, whoever held it."""

import itertools
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbatch.trainers.engine import whole_layers
from bigbatch.trainers.engine.whole_layers import WholeLayers, share_out


@given(st.lists(st.floats(0, 100), max_size=12), st.integers(1, 5))
def test_work_is_shared_out_evenly(costs, ranks):
    owners = share_out(costs, ranks)
    loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == r) for r in range(ranks)]
    assert sum(loads) == pytest.approx(sum(costs))
    best = max(sum(costs) / ranks, *costs, 0)
    assert max(loads) <= best * 2  # Graham 1969: of any order


class Mail:
    """All-to-all of threads that stand for ranks."""

    def __init__(self, world):
        self.barrier = threading.Barrier(world)
        self.box = {}
        self.local = threading.local()

    def __call__(self, sent, lengths, like):
        me = self.local.rank
        for rank, parts in enumerate(sent):
            self.box[me, rank] = parts
        self.barrier.wait()
        received = [self.box[rank, me] for rank in range(len(sent))]
        self.barrier.wait()
        assert [[p.numel() for p in parts] for parts in received] == lengths
        return received


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_every_value_travels_to_its_owner_and_back(data):
    world = data.draw(st.integers(1, 4))
    shapes = data.draw(
        st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=6)
    )
    layers = [torch.randn(shape) for shape in shapes]
    ends = []
    for layer in layers:
        inside = st.lists(st.integers(0, layer.numel()), min_size=world - 1, max_size=world - 1)
        ends.append(list(itertools.pairwise([0, *sorted(data.draw(inside)), layer.numel()])))
    ranges = [[(e[rank][0], e[rank][1] - e[rank][0]) for e in ends] for rank in range(world)]
    mail, results, errors = Mail(world), {}, []

    def rank_of(rank):
        mail.local.rank = rank
        try:
            exchange = WholeLayers(
                [t.shape for t in layers], ranges, [float(t.numel()) for t in layers], rank
            )
            pieces = [
                t.flatten()[start : start + n]
                for t, (start, n) in zip(layers, ranges[rank], strict=True)
            ]
            wholes = exchange.gather(pieces)
            results[rank] = (wholes, exchange.scatter([2 * w for w in wholes]), pieces)
        except Exception as error:
            errors.append(error)
            mail.barrier.abort()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole_layers, "_all_to_all", mail)
        threads = [threading.Thread(target=rank_of, args=(rank,)) for rank in range(world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    owned = [whole for rank in range(world) for whole in results[rank][0]]
    assert len(owned) == len(layers)
    for whole in owned:
        assert any(torch.equal(whole, layer) for layer in layers if layer.shape == whole.shape)
    for _, back, pieces in results.values():
        assert all(torch.equal(b, 2 * p) for b, p in zip(back, pieces, strict=True))
