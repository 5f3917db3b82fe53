"""Digests against their definition, in Python's integers, and what they must not miss."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bigbatch.trainers.ledger.digest import Digester, Part, from_limbs, of_int, to_limbs
from bigbatch.trainers.ledger.multipliers import (
    MASK,
    digest_bytes,
    digest_samples,
    multipliers,
    name_key,
)

CPU = torch.device("cpu")
DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)
digester = Digester()


def content(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def definition(name: str, tensor: Tensor) -> int:
    """multipliers.py's formula, a word at a time."""
    size = tensor.element_size()
    width = min(size, 4)
    data = content(tensor)
    words = [
        int.from_bytes(data[i : i + width], "little", signed=True)
        for i in range(0, len(data), width)
    ]
    row = math.prod(tensor.shape[1:] if tensor.ndim > 1 else tensor.shape) * size // width
    columns = multipliers("column", row).tolist()
    rows = multipliers("row", max(1, len(words) // max(1, row))).tolist()
    factors = (columns[i % row] * rows[i // row] * name_key(name) for i in range(len(words)))
    return sum(w * m for w, m in zip(words, factors, strict=True)) & MASK


def digest(name: str, tensor: Tensor) -> int:
    return int(digester("any", [Part.whole(name, tensor)], CPU)) & MASK


def bits(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Any bits, NaN and infinity among them."""
    size = torch.empty(0, dtype=dtype).element_size()
    raw = np.random.default_rng(seed).bytes(math.prod(shape) * size)
    if dtype == torch.bool:
        raw = bytes(b & 1 for b in raw)
    return torch.frombuffer(bytearray(raw), dtype=dtype).view(shape)


shapes = st.lists(st.integers(1, 7), max_size=4).map(tuple)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), shapes, st.sampled_from(DTYPES))
def test_a_digest_is_what_its_definition_says(
    seed: int, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    tensor = bits(seed, shape, dtype)
    found = definition("layer.weight", tensor)
    assert digest("layer.weight", tensor) == found
    size = tensor.element_size()
    assert digest_bytes("layer.weight", content(tensor), size, tensor.shape) == found
    if len(shape) == 4:
        assert digest("layer.weight", tensor.to(memory_format=torch.channels_last)) == found


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), shapes, st.sampled_from(DTYPES), st.lists(st.integers(0, 2400)))
def test_pieces_cut_anywhere_add_up_in_any_order(
    seed: int, shape: tuple[int, ...], dtype: torch.dtype, cuts: list[int]
) -> None:
    tensor = bits(seed, shape, dtype)
    flat = tensor.flatten()
    borders = sorted({0, flat.numel(), *(cut % flat.numel() for cut in cuts)})
    ranges = list(pairwise(borders))
    np.random.default_rng(seed).shuffle(ranges)
    sums = torch.zeros(3, dtype=torch.float64)
    for start, end in ranges:
        piece = Part("w", flat[start:end], start, tuple(tensor.shape))
        sums += to_limbs(digester("any", [piece], CPU)[None]).flatten()
    assert from_limbs(sums.tolist()) == [definition("w", tensor)]


@pytest.mark.parametrize("shape", [(300, 64, 3, 3), (70_001,), (3, 40_000), (64, 300, 1, 2)])
def test_large_tensors_are_digested_in_blocks(shape: tuple[int, ...]) -> None:
    tensor = bits(1, shape, torch.float32)
    expected = digest_bytes("w", content(tensor), 4, shape)
    assert digest("w", tensor) == expected
    if len(shape) == 4:
        assert digest("w", tensor.to(memory_format=torch.channels_last)) == expected
    half = Part("w", tensor.flatten()[40_000:], 40_000, shape)
    rest = Part("w", tensor.flatten()[:40_000], 0, shape)
    assert int(digester("any", [half, rest], CPU)) & MASK == expected


def flipped(tensor: Tensor, place: int, bit: int) -> Tensor:
    changed = tensor.clone()
    words = changed.view(-1).view(torch.int32)
    words[place] ^= (1 << bit) if bit < 31 else -(1 << 31)
    return changed


@pytest.mark.parametrize("value", [0.0, 1.0, -3e38])
def test_every_single_bit_counts(value: float) -> None:
    tensor = torch.full((2, 3), value)
    found = {digest("w", flipped(tensor, i, bit)) for i in range(6) for bit in range(32)}
    assert len(found | {digest("w", tensor)}) == 6 * 32 + 1


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_the_same_bit_flipped_in_two_elements_is_seen(value: float) -> None:
    """What an XOR of all bits misses, and a sum modulo 2^32 where it is the sign."""
    tensor = torch.full((2, 5), value)
    before = digest("w", tensor)
    for bit in range(32):
        once = [flipped(tensor, i, bit) for i in range(10)]
        for i in range(10):
            for j in range(i):
                assert digest("w", flipped(once[i], j, bit)) != before


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 59), st.integers(0, 59))
def test_two_swapped_elements_are_seen(seed: int, i: int, j: int) -> None:
    tensor = bits(seed, (6, 10), torch.float32)
    words = tensor.view(-1).view(torch.int32)
    if words[i] == words[j]:
        return
    before = digest("w", tensor)
    words[i], words[j] = words[j].clone(), words[i].clone()
    assert digest("w", tensor) != before


def test_equal_tensors_under_other_names_are_told_apart() -> None:
    a, b = torch.ones(64), torch.arange(64.0)
    one = int(digester("any", [Part.whole("a", a), Part.whole("b", b)], CPU))
    other = int(digester("any", [Part.whole("a", b), Part.whole("b", a)], CPU))
    assert one != other
    assert digest("a", a) != 0  # torch.hash_tensor gives 0


def test_samples_count_with_place_label_and_checksum() -> None:
    places, samples = np.arange(3), np.array([7, 5, 7])
    labels, checksums = np.array([0, 1, 0]), np.array([9, 8, 9], np.uint32)
    found = digest_samples(places, samples, labels, checksums)
    for other in (
        (places, np.array([5, 7, 7]), labels, checksums),
        (places, samples, np.array([0, 1, 1]), checksums),
        (places, samples, labels, np.array([9, 8, 1], np.uint32)),
        (places + 1, samples, labels, checksums),
        (places, samples, labels, None),
    ):
        assert digest_samples(*other) != found
    parts = [digest_samples(*(x[s] for x in (places, samples, labels, checksums))) for s in
             (slice(0, 1), slice(1, 3))]  # fmt: skip
    assert sum(parts) & MASK == found


def test_limbs_carry_any_digest_over_ranks() -> None:
    values = [0, 1, MASK, 1 << 63, 0x0123456789ABCDEF]
    limbs = sum(to_limbs(torch.stack([of_int(v, CPU) for v in values])) for _ in range(50))
    assert from_limbs(limbs.flatten().tolist()) == [50 * v & MASK for v in values]
