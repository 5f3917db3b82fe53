"""What a rank holds of a sharded model and optimizer, and how pieces and whole tensors meet.

ZeRO cuts a flat line of all parameters into equal parts, FSDP2 each parameter into rows.
Either way a rank's optimizer updates one contiguous range of every flattened parameter, which
may be empty. Checkpoints hold whole tensors by name, so they fit any backend and world size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from pydantic import JsonValue
from torch import Tensor, nn

from bigbatch.trainers.engine.whole_layers import WholeLayers
from bigbatch.trainers.optim import load_optimizer_state, optimizer_state_by_name
from bigbatch.trainers.optim.layerwise import LayerwiseOptimizer
from bigbatch.trainers.optim.muon import Muon, work


@dataclass(frozen=True)
class Piece:
    """The range of a parameter that this rank's optimizer updates, possibly empty."""

    name: str
    whole: torch.Size  # shape of the whole parameter
    start: int  # of the range, in the flattened parameter
    tensor: nn.Parameter  # the range, in memory that the backend reads: rows, or flat

    def cut(self, value: Tensor) -> Tensor:
        """This piece's share of a whole tensor."""
        part = value.flatten()[self.start : self.start + self.tensor.numel()]
        return part.view_as(self.tensor)


class Pieces:
    """The pieces of all trainable parameters, in the model's order, the same on every rank."""

    def __init__(self, module: nn.Module, pieces: Sequence[Piece]) -> None:
        self.module = module
        self.pieces = list(pieces)
        ranges = [(p.start, p.tensor.numel()) for p in self.pieces]
        self._ranges: list[list[tuple[int, int]]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(self._ranges, ranges)
        self.names: dict[Tensor, str] = {p.tensor: p.name for p in self.pieces}

    def adopt(self, optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> None:
        """Let `optimizer`, built over whole `parameters`, update the pieces instead.

        Its groups stay, so that every piece keeps the settings of its parameter.
        """
        pieces: dict[Tensor, Piece] = {parameters[p.name]: p for p in self.pieces}
        state = dict(optimizer.state)  # Adagrad makes its own at once
        optimizer.state.clear()
        for parameter, values in state.items():
            piece = pieces[parameter]
            optimizer.state[piece.tensor] = {
                k: piece.cut(v).to(piece.tensor.device, copy=True) if _is_whole(v, piece) else v
                for k, v in values.items()
            }
        for group in optimizer.param_groups:
            group["params"] = [pieces[p].tensor for p in group["params"]]
        if isinstance(optimizer, LayerwiseOptimizer):
            optimizer.sum_over_ranks = _sum
        elif isinstance(optimizer, Muon):
            optimizer.take_pieces(self._whole_layers(optimizer), _sum)
        self.optimizer = optimizer

    def _whole_layers(self, muon: Muon) -> WholeLayers:
        """Where Muon's matrices are put together, each on one rank."""
        numbers = {piece.tensor: number for number, piece in enumerate(self.pieces)}
        own = [numbers[p] for g in muon.param_groups if g["use_muon"] for p in g["params"]]
        shapes = [self.pieces[n].whole for n in own]
        ranges = [[of_rank[n] for n in own] for of_rank in self._ranges]
        return WholeLayers(shapes, ranges, [work(shape) for shape in shapes], dist.get_rank())

    # Whole tensors from pieces, and back. Every rank calls these in the same step.

    def gather(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, JsonValue]]:
        """Weights, and on rank 0 the optimizer state, as a checkpoint stores them."""
        return self.weights(), *self.optimizer_state()

    def weights(self) -> dict[str, Tensor]:
        """The model's state dict with whole tensors, on every rank."""
        from torch.distributed.tensor import DTensor  # a second; whoever shards has it already

        return {
            name: value.full_tensor() if isinstance(value, DTensor) else value
            for name, value in self.module.state_dict().items()
        }

    def optimizer_state(self) -> tuple[dict[str, Tensor], dict[str, JsonValue]]:
        """What `optimizer_state_by_name` gives of an optimizer that is not sharded.

        Whole tensors on rank 0, on its device; on the other ranks nothing.
        """
        local, scalars = optimizer_state_by_name(self.optimizer, self.names)
        keys = sorted({full.partition("/")[0] for full in local})
        tensors: dict[str, Tensor] = {}
        for key in keys:
            having = [i for i, p in enumerate(self.pieces) if f"{key}/{p.name}" in local]
            cut = [i for i in having if local[f"{key}/{self.pieces[i].name}"].ndim > 0]
            for i in set(having) - set(cut):  # counters, the same on every rank
                full = f"{key}/{self.pieces[i].name}"
                tensors[full] = local[full]
            values = [local[f"{key}/{self.pieces[i].name}"] for i in cut]
            for i, value in zip(cut, self._gather(cut, values), strict=False):
                tensors[f"{key}/{self.pieces[i].name}"] = value
        if dist.get_rank() != 0:
            return {}, {}
        return tensors, scalars

    def whole(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors from a value of each piece, by name: on rank 0; elsewhere nothing."""
        wholes = self._gather([*range(len(self.pieces))], [values[p.name] for p in self.pieces])
        return {p.name: w for p, w in zip(self.pieces, wholes, strict=False)}

    def cut(self, wholes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's pieces of whole tensors; ValueError where one is of no parameter."""
        pieces = {piece.name: piece for piece in self.pieces}
        for name, whole in wholes.items():
            if name not in pieces or whole.shape != pieces[name].whole:
                raise ValueError(f"{name} of shape {list(whole.shape)} is no trained parameter")
        return {name: pieces[name].cut(whole) for name, whole in wholes.items()}

    @torch.no_grad()
    def load(
        self,
        weights: dict[str, Tensor],
        tensors: dict[str, Tensor],
        scalars: dict[str, JsonValue],
    ) -> None:
        """Take this rank's part of whole weights and of a whole optimizer state."""
        from torch.distributed.tensor import DTensor

        own = self.module.state_dict()
        if own.keys() != weights.keys():
            raise ValueError(f"weights do not fit: {sorted(own.keys() ^ weights.keys())[:8]}")
        for name, value in own.items():
            if isinstance(value, DTensor):
                piece = row_piece(name, value)
                piece.tensor.copy_(piece.cut(weights[name]))
            else:
                value.copy_(weights[name])
        for piece in self.pieces:  # ZeRO keeps them apart from the model's own weights
            piece.tensor.copy_(piece.cut(weights[piece.name]))
        named = {piece.name: piece for piece in self.pieces}
        local = {}
        for full, value in tensors.items():
            name = full.partition("/")[2]
            if name not in named:
                raise ValueError(f"optimizer state {full!r} belongs to no trained parameter")
            local[full] = named[name].cut(value) if _is_whole(value, named[name]) else value
        load_optimizer_state(self.optimizer, self.names, local, scalars)

    def _gather(self, numbers: list[int], values: list[Tensor]) -> list[Tensor]:
        """Whole tensors on rank 0 from every rank's pieces, in one collective; [] elsewhere."""
        if not values:
            return []
        sizes = [sum(ranges[i][1] for i in numbers) for ranges in self._ranges]
        sent = values[0].new_zeros(max(sizes))  # collectives need equal shapes
        torch.cat([v.flatten() for v in values], out=sent[: sizes[dist.get_rank()]])
        if dist.get_rank() != 0:
            dist.gather(sent, None)
            return []
        received = [torch.empty_like(sent) for _ in sizes]
        dist.gather(sent, received)
        wholes = [sent.new_empty(self.pieces[i].whole) for i in numbers]
        for ranges, part in zip(self._ranges, received, strict=True):
            offset = 0
            for i, whole in zip(numbers, wholes, strict=True):
                start, length = ranges[i]
                whole.view(-1)[start : start + length] = part[offset : offset + length]
                offset += length
        return wholes


def row_piece(name: str, parameter: Any) -> Piece:
    """The piece of an FSDP2 parameter: rows in `ceil(rows / world)` a rank, as torch.chunk."""
    local: Tensor = parameter.detach().to_local()
    rows = parameter.shape[0]
    first = min(dist.get_rank() * -(-rows // dist.get_world_size()), rows)
    start = first * (parameter.numel() // max(1, rows))
    return Piece(name, parameter.shape, start, nn.Parameter(local, requires_grad=False))


def _is_whole(value: Any, piece: Piece) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape == piece.whole


def _sum(tensor: Tensor) -> Tensor:
    dist.all_reduce(tensor)
    return tensor
