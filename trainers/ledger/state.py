"""What of a run's state a rank digests: of pieces its own, of what all hold rank 0 alone.

Or, to compare ranks, each its own copy of what all hold.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from bigbatch.configs.files import to_json
from bigbatch.trainers.engine import Engine
from bigbatch.trainers.engine.pieces import Piece, row_piece
from bigbatch.trainers.ledger.digest import Digester, Part, of_int
from bigbatch.trainers.ledger.multipliers import MASK, digest_value
from bigbatch.trainers.optim.state import own_state


class StateDigests:
    """Digests of gradient, weights, optimizer state and buffers, int64 [] on the device.

    Those of all ranks add up, modulo 2^64, to the digest of what one rank would hold: they name
    whole tensors as checkpoints do, on any backend and number of ranks.
    """

    def __init__(self, engine: Engine) -> None:
        module = engine.module
        self._engine = engine
        self._main = engine.rank == 0
        self._digest = Digester()
        pieces = [] if engine.pieces is None else engine.pieces.pieces
        self._pieces: dict[str, Piece] = {piece.name: piece for piece in pieces}
        # Under each of its names, as a checkpoint has it.
        named = dict(module.named_parameters(remove_duplicate=False))
        others = {n: p for n, p in named.items() if n not in self._pieces}
        # What FSDP2 cuts into rows though nobody trains it.
        self._frozen = [row_piece(n, p) for n, p in others.items() if hasattr(p, "to_local")]
        self._whole = {n: p for n, p in others.items() if not hasattr(p, "to_local")}
        self._copied = {n: p for n, p in named.items() if not hasattr(p, "to_local")}
        kept = module.state_dict().keys()
        self._buffers = {name: b for name, b in module.named_buffers() if name in kept}
        self.copied = ["weights", "optimizer", "buffers"]  # what `copies` has, of each kind all
        if engine.pieces is not None:
            self.copied = ["weights", "buffers"] if self._copied else ["buffers"]
        self._names: dict[Tensor, str] = {p: name for name, p in module.named_parameters()}
        if engine.pieces is not None:
            self._names = engine.pieces.names

    def state(self, copies: Tensor | None = None) -> Tensor:
        """This rank's part of weights, optimizer state and buffers: int64 [3].

        `copies` is what `copies` gives, where that is known.
        """
        if self._engine.pieces is not None:
            return torch.stack([self.weights(), self.optimizer(), self.buffers()])
        if not self._main:
            return torch.zeros(3, dtype=torch.int64, device=self._engine.device)
        return self.copies() if copies is None else copies

    def copies(self) -> Tensor:
        """Of the weights, optimizer state and buffers that each rank has a copy of: int64 [3].

        The same on all ranks. On DDP that is all there is, under ZeRO weights and buffers, under
        FSDP2 buffers alone.
        """
        digests = [self._sum(f"copied {kind}", parts) for kind, parts in self._copies().items()]
        values = sum(digest_value(*value) for value in self._copied_values())
        digests[1] = digests[1] + of_int(values, self._engine.device)
        return torch.stack(digests)

    def each_copy(self) -> dict[str, int]:
        """The same by tensor."""
        found: dict[str, int] = {}
        for parts in self._copies().values():
            for part in parts:
                found[part.name] = int(self._sum("one", [part])) & MASK
        return found | {name: digest_value(name, value) for name, value in self._copied_values()}

    def _copies(self) -> dict[str, list[Part]]:
        tensors: dict[str, Tensor] = {}
        if self._engine.pieces is None:
            tensors = own_state(self._engine.optimizer, self._names)[0]
        kinds: dict[str, Mapping[str, Tensor]] = {
            "weights": self._copied,
            "optimizer": tensors,
            "buffers": self._buffers,
        }
        return {k: [Part.whole(n, t) for n, t in some.items()] for k, some in kinds.items()}

    def _copied_values(self) -> list[tuple[str, str]]:
        if self._engine.pieces is not None:
            return []
        scalars = own_state(self._engine.optimizer, self._names)[1]
        return [(name, to_json(value)) for name, value in scalars.items()]

    def gradient(self) -> Tensor:
        """Of what `engine.reduce` has left, in this rank's part of it."""
        digest = self._sum("gradient", self._gradients())
        if self._pieces:  # each step has its own, which nobody else keeps
            self._digest.forget("gradient")
        return digest

    def weights(self) -> Tensor:
        pieces = (*self._pieces.values(), *self._frozen)
        parts = [Part(p.name, p.tensor, p.start, tuple(p.whole)) for p in pieces]
        whole = self._whole if self._main else {}
        return self._sum("weights", [*parts, *(Part.whole(n, p) for n, p in whole.items())])

    def buffers(self) -> Tensor:
        """Of BatchNorm's running statistics, and of all others that a checkpoint holds."""
        buffers = self._buffers if self._main else {}
        parts = (Part.whole(name, b) for name, b in buffers.items())
        return self._sum("buffers", parts)

    def optimizer(self) -> Tensor:
        """Of all state that a checkpoint holds, counters included."""
        if self._engine.pieces is None and not self._main:
            return self._sum("optimizer", ())
        tensors, scalars = own_state(self._engine.optimizer, self._names)
        total = self._sum("optimizer", self._state(tensors))
        values = sum(
            digest_value(name, to_json(value))
            for name, value in scalars.items()
            if self._counts(name)
        )
        return total + of_int(values, self._engine.device) if values else total

    def _gradients(self) -> Iterator[Part]:
        for name, piece in self._pieces.items():
            if piece.tensor.grad is not None:
                yield Part(name, piece.tensor.grad, piece.start, tuple(piece.whole))
        whole = self._whole if self._main else {}
        for name, parameter in whole.items():
            if parameter.grad is not None:
                yield Part.whole(name, parameter.grad)

    def _state(self, tensors: dict[str, Tensor]) -> Iterator[Part]:
        for name, value in tensors.items():
            piece = self._pieces.get(name.partition("/")[2])
            if piece is not None and value.ndim and value.shape == piece.tensor.shape:
                yield Part(name, value, piece.start, tuple(piece.whole))
            elif self._counts(name):
                yield Part.whole(name, value)

    def _counts(self, name: str) -> bool:
        """Whether this rank is the one that counts what each holds of a parameter, or all do."""
        piece = self._pieces.get(name.partition("/")[2])
        if piece is None:
            return self._main
        return piece.start == 0 and piece.tensor.numel() > 0

    def _sum(self, kind: str, parts: Iterable[Part]) -> Tensor:
        return self._digest(kind, parts, self._engine.device)
