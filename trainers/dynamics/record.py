"""How samples.f16 is written: from a step's own logits, in the all-reduce that it makes anyway.

Each rank has the samples of its micro-batches, and zeros for the others. Three float16 are 48 bits,
a whole number that a float64 holds exactly, and so is its sum with zeros: one number a sample goes
through the reduction, in any order, and rank 0 writes the step's rows whole.
"""

import torch
from torch import Tensor

from bigbatch.data.batch import MicroBatch
from bigbatch.trainers.dynamics.rows import LARGEST, to_bytes
from bigbatch.trainers.job import Job
from bigbatch.trainers.monitoring.log import Log


class SampleRecords:
    """Records the samples of one attempt's steps. Every rank calls it in the same order."""

    def __init__(self, job: Job, log: Log) -> None:
        self._on = job.recipe.log.samples
        self._course, self._log, self._engine = job.course, log, job.engine
        self._timeline, self._size = job.inputs.plan.timeline, job.recipe.micro_batch
        self._course.listens = self._on
        self._packed: Tensor | None = None  # [samples of the step], on the device

    def see(self, batch: MicroBatch) -> None:
        """Take in what the pass just made came to for each sample; waits for nothing."""
        heard, self._course.heard = self._course.heard, None
        if not self._on:
            return
        assert heard is not None
        packed = pack(heard.logits[: len(batch.labels)], batch.labels, heard.losses)
        first = batch.index * self._size
        if batch.bad:  # another sample stands there: of this place nothing is known
            begin = self._timeline.first(batch.step) + first
            packed[[entry["position"] - begin for entry in batch.bad]] = 0
        if self._packed is None:
            self._packed = self._none(batch.step)
        self._packed[first : first + len(packed)] = packed

    def share(self, step: int) -> Tensor:
        """This rank's part of the all-reduce of the step after `step` finished ones."""
        packed, self._packed = self._packed, None
        if not self._on:
            return torch.zeros(0, dtype=torch.float64)
        return self._none(step) if packed is None else packed  # a rank may have no micro-batch

    def write(self, packed: Tensor, *, updated: bool) -> None:
        """Write the step's rows: `share`, summed over ranks. `updated`: it changed the weights."""
        if self._on and self._engine.rank == 0:
            self._log.samples(to_bytes(packed.cpu().numpy(), updated=updated))

    def _none(self, step: int) -> Tensor:
        count = self._timeline.batch(step)
        return torch.zeros(count, dtype=torch.float64, device=self._engine.device)


@torch.no_grad()
def pack(logits: Tensor, labels: Tensor, losses: Tensor) -> Tensor:
    """Loss, margin and p(true) as float16 in the bits of one whole number each, float64 [B].

    Logits [B, C], labels int64 [B], losses [B].
    """
    logits = logits.float()
    own = logits.gather(1, labels[:, None])[:, 0]
    others = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    values = torch.stack([losses.float(), own - others, (own - logits.logsumexp(1)).exp()])
    bits = values.clamp(-LARGEST, LARGEST).half().view(torch.int16).long() & 0xFFFF
    loss, margin, p_true = bits
    return (loss | margin << 16 | p_true << 32).double()
