"""Layers that lie in pieces on all ranks, each put together on one of them for a while."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

Range = tuple[int, int]  # start and length, in a flattened layer


class WholeLayers:
    """Which rank computes with which of some layers, and how their pieces travel there and back.

    Each way is one all-to-all: a rank sends what it holds, and receives the layers that it owns.
    """

    def __init__(
        self,
        shapes: Sequence[torch.Size],
        ranges: Sequence[Sequence[Range]],
        costs: Sequence[float],
        rank: int,
    ) -> None:
        """`ranges[rank][layer]` is the piece of a layer that a rank holds, possibly empty; `costs`
        are the work that each layer makes. Both are the same on every rank."""
        self._shapes, self._ranges = list(shapes), ranges
        self._rank, self._world = rank, len(ranges)
        owners = share_out(costs, self._world)
        self._owned = [
            [layer for layer, owner in enumerate(owners) if owner == rank]
            for rank in range(self._world)
        ]

    def shapes(self) -> list[torch.Size]:
        """Of all layers, when they are whole."""
        return self._shapes

    def gather(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """Whole tensors of this rank's own layers, from all ranks' pieces of all. Collective."""
        mine = self._owned[self._rank]
        sent = [[pieces[layer].flatten() for layer in layers] for layers in self._owned]
        lengths = [[self._ranges[rank][layer][1] for layer in mine] for rank in range(self._world)]
        wholes = [pieces[0].new_empty(self._shapes[layer]) for layer in mine]
        for rank, parts in enumerate(_all_to_all(sent, lengths, pieces[0])):
            for layer, whole, part in zip(mine, wholes, parts, strict=True):
                start, length = self._ranges[rank][layer]
                whole.view(-1)[start : start + length] = part
        self._like = list(pieces)
        return wholes

    def scatter(self, wholes: Sequence[Tensor]) -> list[Tensor]:
        """Pieces of all layers, of the shapes that `gather` was given, from the layers that each
        rank has whole. Collective."""
        flat = dict(zip(self._owned[self._rank], (w.flatten() for w in wholes), strict=True))
        sent = [
            [flat[layer][start : start + length] for layer, (start, length) in enumerate(of_rank)
             if layer in flat]
            for of_rank in self._ranges
        ]  # fmt: skip
        lengths = [[self._like[layer].numel() for layer in layers] for layers in self._owned]
        pieces = list(self._like)
        received = _all_to_all(sent, lengths, self._like[0])
        for layers, parts in zip(self._owned, received, strict=True):
            for layer, part in zip(layers, parts, strict=True):
                pieces[layer] = part.view(self._like[layer].shape)
        self._like = []
        return pieces


def share_out(costs: Sequence[float], ranks: int) -> list[int]:
    """A rank for each of some costs: the dearest first, to whom has least (Graham 1969)."""
    loads = [0.0] * ranks
    owners = [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda n: (-costs[n], n)):
        owners[number] = loads.index(min(loads))
        loads[owners[number]] += costs[number]
    return owners


def _all_to_all(
    sent: list[list[Tensor]], lengths: list[list[int]], like: Tensor
) -> list[list[Tensor]]:
    """Vectors `sent` to each rank; from each those of these lengths."""
    from_ranks = [sum(of_rank) for of_rank in lengths]
    received = like.new_empty(sum(from_ranks))
    dist.all_to_all_single(
        received,
        torch.cat([like.new_empty(0), *(part for parts in sent for part in parts)]),
        from_ranks,
        [sum(part.numel() for part in parts) for parts in sent],
    )
    return [
        list(block.split(of_rank))
        for block, of_rank in zip(received.split(from_ranks), lengths, strict=True)
    ]
