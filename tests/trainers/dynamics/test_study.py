"""Figures of samples against a plain reading of their definitions, sample by sample."""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbatch.trainers.dynamics.record import pack
from bigbatch.trainers.dynamics.rows import read_rows, to_bytes
from bigbatch.trainers.dynamics.study import Numbers, study, weights
from bigbatch.trainers.monitoring.log import cut_rows


def rows_of(loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    packed = pack(logits, labels, loss).numpy()
    return np.frombuffer(to_bytes(packed, updated=True), "<f2").reshape(-1, 3)


def test_a_row_is_loss_margin_and_p_of_the_label() -> None:
    logits = torch.tensor([[1.0, 3.0, 0.5], [2.0, -1.0, 2.5], [0.0, 0.0, 0.0]])
    labels = torch.tensor([1, 0, 2])
    loss = F.cross_entropy(logits, labels, reduction="none")
    rows = rows_of(loss, logits, labels)
    p = [math.exp(-each) for each in loss.tolist()]
    expected = [[loss[0], 2.0, p[0]], [loss[1], -0.5, p[1]], [loss[2], 0.0, p[2]]]
    np.testing.assert_array_equal(rows, np.array(expected, np.float16))


def test_sums_with_zeros_of_other_ranks_keep_every_bit() -> None:
    torch.manual_seed(0)
    logits = 30 * torch.randn(1000, 7)
    packed = pack(logits, torch.randint(7, (1000,)), 1000 * torch.rand(1000))
    mine = torch.where(torch.arange(1000) % 3 == 0, packed, 0.0)
    others = packed - mine
    assert to_bytes((mine + others).numpy(), updated=True) == to_bytes(packed.numpy(), updated=True)
    assert (packed < 2**48).all()
    assert (packed == packed.round()).all()


def test_what_is_not_finite_or_too_large_has_one_form() -> None:
    logits = torch.tensor([[math.nan, 0.0], [1e6, 0.0], [0.0, 0.0]])
    labels = torch.tensor([0, 1, 0])
    rows = rows_of(torch.tensor([-math.nan, 1e6, math.inf]), logits, labels)
    assert rows[0].view(np.uint16).tolist() == [0x7E00] * 3
    assert rows[1].tolist() == [65504, -65504, 0]
    assert rows[2, 0] == 65504


def test_a_step_without_update_is_marked_and_keeps_its_numbers() -> None:
    packed = pack(torch.tensor([[1.0, 0.0], [0.0, 9.0]]), torch.tensor([0, 0]), torch.ones(2))
    packed = torch.cat([packed, torch.zeros(1, dtype=torch.float64)])  # one without a record
    plain, marked = (
        np.frombuffer(to_bytes(packed.numpy(), updated=updated), "<f2").reshape(-1, 3)
        for updated in (True, False)
    )
    np.testing.assert_array_equal(np.abs(marked[:, 2]), plain[:, 2])
    np.testing.assert_array_equal(marked[:, :2], plain[:, :2])
    assert np.signbit(marked[:, 2]).tolist() == [True, True, False]
    found = study(marked, lambda positions: positions, 3)
    assert (found.no_update, found.unrecorded) == (2, 1)
    assert not found.seen.any()


def test_rows_are_cut_off_and_holes_are_unrecorded(tmp_path: Path) -> None:
    path = tmp_path / "samples.f16"
    cut_rows(path, 3, recording=False)
    assert not path.exists()
    cut_rows(path, 2, recording=True)
    path.write_bytes(path.read_bytes() + np.ones((4, 3), "<f2").tobytes() + b"torn")
    cut_rows(path, 5, recording=False)
    assert path.stat().st_size == 30
    cut_rows(path, 8, recording=False)  # nothing to cut, nothing to add
    assert path.stat().st_size == 30
    cut_rows(path, 6, recording=True)
    found = study(read_rows(path), lambda positions: positions, 6)
    assert found.seen.tolist() == [False, False, True, True, True, False]
    assert (found.positions, found.unrecorded) == (6, 3)


VISITS = st.lists(
    st.tuples(st.integers(0, 5), st.sampled_from([-2.0, -0.5, 0.0, 0.25, 3.0]), st.floats(0.1, 1)),
    max_size=60,
)


@settings(max_examples=150)
@given(VISITS, st.integers(1, 70))
def test_figures_are_those_of_their_definitions(
    visits: list[tuple[int, float, float]], chunk: int
) -> None:
    drawn = np.array([sample for sample, _, _ in visits], np.int64)
    values = [[1 - p, margin, p] for _, margin, p in visits]
    rows = np.array(values, np.float16).reshape(-1, 3)

    def samples(positions: Numbers) -> Numbers:
        return drawn[positions]

    found = study(rows, samples, 6, chunk)
    for sample in range(6):
        own = rows[drawn == sample].astype(np.float64)
        right = [margin > 0 for margin in own[:, 1]]
        assert found.visits[sample] == len(own)
        assert found.forgotten[sample] == sum(
            before and not after for before, after in pairwise(right)
        )
        assert found.learned[sample] == (right.index(True) + 1 if any(right) else 0)
        if not len(own):
            assert math.isnan(found.margin[sample])
            continue
        assert found.margin[sample] == pytest.approx(own[:, 1].mean())
        assert found.confidence[sample] == pytest.approx(own[:, 2].mean())
        assert found.loss[sample] == pytest.approx(own[:, 0].mean())
        assert found.variability[sample] == pytest.approx(own[:, 2].std(), abs=1e-7)
        assert found.right[sample] == pytest.approx(np.mean(right))
    seen = [i for i in range(6) if (drawn == i).any()]
    assert found.ranking().tolist() == sorted(seen, key=lambda i: (found.margin[i], i))


def test_weights_of_each_way() -> None:
    margins = {0: [-1.0, -1.0], 1: [1.0, -0.5, 1.0], 2: [2.0, 2.0]}  # sample 3 is never seen
    visits = [(s, m) for s, own in margins.items() for m in own]
    drawn = np.array([s for s, _ in visits])
    rows = np.array([[0.5, m, 0.9 if m > 0 else 0.1] for _, m in visits], np.float16)
    found = study(rows, lambda positions: drawn[positions], 4)
    assert found.unforgettable.tolist() == [False, False, True, False]
    assert found.never_learned.tolist() == [True, False, False, False]
    assert weights(found, "errors", 0.25).tolist() == [0, 1, 1, 1]
    assert weights(found, "errors", 0.5).tolist() == [0, 0, 1, 1]
    assert weights(found, "errors", 0.0).tolist() == [1, 1, 1, 1]
    assert weights(found, "forgotten").tolist() == [2, 2, 1, pytest.approx(5 / 3)]
    ambiguous = weights(found, "ambiguous")
    assert ambiguous[[0, 2]] == pytest.approx([0, 0], abs=1e-6)
    assert ambiguous[1] == pytest.approx(np.std([0.9, 0.1, 0.9]), abs=1e-3)
    assert ambiguous[3] == pytest.approx(ambiguous[:3].mean())
