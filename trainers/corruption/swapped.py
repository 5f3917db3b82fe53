"""Swapped recomputation: each rank also computes a micro-batch of the next rank.

A micro-batch's gradient follows from (recipe, step, micro-batch) and the weights, never from the
rank, so whoever computes it gets the same bits, as long as the same operations round alike: on one
kind of CPU, with as many threads. Ranks compare digests of it from before it is added to others.
A single rank computes one of its own twice, which shows faults that come and go.
"""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bigbatch.data.batch import MicroBatch
from bigbatch.data.rng import key64
from bigbatch.trainers.engine.sharpness import Sharpness
from bigbatch.trainers.job import Job
from bigbatch.trainers.ledger.digest import Digester, Part

_HALF = 0xFFFFFFFF
_OWN, _CHECKED = 0, 1


def why_not(job: Job, *, alike: bool) -> str | None:
    """Why gradients of two ranks cannot be compared bit for bit, if they cannot.

    `alike`: all ranks have the same environment.
    """
    recipe, engine = job.recipe, job.engine
    if job.inputs.order is None:
        return "data.stream does not give a micro-batch a second time"
    if engine.device.type != "cpu":
        return "a GPU's kernels may add in another order each time"
    if engine.pieces is not None and recipe.backend == "fsdp2":
        return "on backend fsdp2 no rank has the weights to compute another one's micro-batch"
    if engine.world > 1 and recipe.model.compile and not engine.sees_each:
        return "inside DDP torch.compile makes other code than outside; reduction: exact has none"
    if not alike:
        return "ranks have unlike processors, versions, threads or settings, which round otherwise"
    return None


class Swapped:
    """Gradients of micro-batches, by digest, of this rank and of the next, every so many steps."""

    def __init__(self, job: Job, every: int) -> None:
        self._engine, self._every = job.engine, every
        # A single micro-batch is not worth other processes.
        data = job.recipe.data.model_copy(update={"workers": 0})
        self._job = replace(job, recipe=job.recipe.model_copy(update={"data": data}))
        named = dict(job.engine.module.named_parameters())
        self.names = list(named)
        self._names: dict[Tensor, str] = {p: name for name, p in named.items()}
        self._digest = Digester()
        config = job.recipe.regularise.sharpness
        self._sharpness = None if config is None else Sharpness(config, job.engine.module)
        self.due = False

    def begin(self, step: int, micro_batches: int) -> None:
        """Begin the step after `step` finished ones."""
        self.due = (step + 1) % self._every == 0
        if not self.due:
            return
        engine, seed = self._engine, self._job.recipe.seed
        self._step = step
        self._active = min(engine.world, micro_batches)  # ranks that have one
        number = 0
        if engine.sees_each:
            each = max(1, micro_batches // engine.world)
            number = key64(seed, step, "swapped recomputation") % each
        self._first = number * engine.world
        self._gradients: list[dict[str, Tensor]] = [{}, {}]  # own, and the next rank's
        self._pixels = [0, 0]

    def see(self, batch: MicroBatch) -> None:
        """Take in a micro-batch of this rank that is about to be computed."""
        if not self.due:
            return
        chosen = batch.index == self._first + self._engine.rank
        self._engine.on_gradient = self._take if chosen else None
        if chosen:
            self._pixels[_OWN] = _checksum(batch)

    def recompute(self) -> None:
        """Compute the next rank's micro-batch, once all own ones are; leaves no trace but in
        running statistics, which in a step are scratch."""
        self._engine.on_gradient = None
        if self.due and self._engine.rank < self._active:
            self._gradients[_CHECKED], self._pixels[_CHECKED] = self._compute(
                (self._engine.rank + 1) % self._active
            )

    def share(self) -> Tensor:
        """This rank's part of the step's all-reduce: [world * 4], or nothing."""
        if not self.due:
            return torch.zeros(0, dtype=torch.float64)
        totals = [self._total(found) for found in self._gradients]
        return in_row(torch.stack(totals), self._engine.rank, self._engine.world)

    def differing(self, sums: Sequence[float]) -> list[tuple[int, int]]:
        """(owner, checker) of each micro-batch that came out otherwise, from `share` summed."""
        if not self.due:
            return []
        rows = from_rows(sums, 2)
        pairs = [((rank + 1) % self._active, rank) for rank in range(self._active)]
        return [(o, c) for o, c in pairs if rows[o][_OWN] != rows[c][_CHECKED]]

    def micro_batch(self, owner: int) -> int:
        """The number of a rank's micro-batch that is compared."""
        return self._first + owner

    def again(self, owner: int) -> list[int]:
        """A rank's micro-batch once more: digests by tensor."""
        return self.listed(self._compute(owner)[0])

    def found(self) -> dict[str, list[int]]:
        """What this rank found: digests by tensor of its own and of the next rank's gradient."""
        own, checked = map(self.listed, self._gradients)
        return {"own": own, "checked": checked, "pixels": self._pixels}

    def listed(self, gradient: dict[str, Tensor]) -> list[int]:
        """Digests in the order of `names`."""
        return [int(gradient[n]) if n in gradient else 0 for n in self.names]

    def _total(self, gradient: dict[str, Tensor]) -> Tensor:
        if not gradient:
            return torch.zeros((), dtype=torch.int64, device=self._engine.device)
        return torch.stack([*gradient.values()]).sum()

    def _take(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        self._add(self._gradients[_OWN], pairs)

    @torch.no_grad()
    def _add(self, found: dict[str, Tensor], pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        for parameter, gradient in pairs:
            name = self._names[parameter]
            # A gradient that is added to one of zeros has no -0, one that takes its place may.
            part = Part.whole(name, gradient + 0)
            found[name] = self._digest("gradient", [part], self._engine.device)
        self._digest.forget("gradient")

    def _compute(self, owner: int) -> tuple[dict[str, Tensor], int]:
        engine, job = self._engine, self._job
        batch = job.micro_batch(self._step, self._first + owner)
        pixels = _checksum(batch)
        weights = [p for p in self._names if p.requires_grad]
        with torch.random.fork_rng(devices=[]):
            images, targets = job.views(batch.to(engine.device))
            seed = key64(job.recipe.seed, self._step, batch.index, "model")
            torch.manual_seed(seed)
            if self._sharpness is not None:
                self._sharpness.climb(job.objective(engine.module, images, targets))
                torch.manual_seed(seed)
            loss = engine.scaled(job.objective(engine.module, images, targets))
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)
            if self._sharpness is not None:
                self._sharpness.descend()
        found: dict[str, Tensor] = {}
        pairs = zip(weights, gradients, strict=True)
        self._add(found, ((p, g) for p, g in pairs if g is not None))
        return found, pixels


def _checksum(batch: MicroBatch) -> int:
    """Of samples and pixels."""
    return zlib.crc32(batch.pixels.cpu().numpy().data, zlib.crc32(batch.samples.tobytes()))


def in_row(digests: Tensor, rank: int, world: int) -> Tensor:
    """Digests int64 [k] in a rank's row of zeros, float64 [world * k * 2], exact in sums over ranks
    that each have a row of their own."""
    rows = digests.new_zeros((world, len(digests), 2), dtype=torch.float64)
    rows[rank] = torch.stack([digests >> 32 & _HALF, digests & _HALF], 1).double()
    return rows.flatten()


def from_rows(sums: Sequence[float], count: int) -> list[tuple[int, ...]]:
    """`count` digests of each rank."""
    halves = [int(value) for value in sums]
    digests = [high << 32 | low for high, low in zip(halves[::2], halves[1::2], strict=True)]
    return [tuple(digests[i : i + count]) for i in range(0, len(digests), count)]
