"""How a run's ledger is written: digests of each step, in the all-reduce that it makes anyway.

The state after a step is digested and told in the next step's all-reduce, before it changes, so
that no collective is added; a save, at which a ledger has to be complete, makes an all-reduce of
its own, and so does a batch that grows, which ends an attempt. So the file is a step behind while a
run goes on, never at a checkpoint.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from google_crc32c import value as crc32c
from torch import Tensor

from bigbatch.configs.targets import learns_targets
from bigbatch.data.batch import MicroBatch
from bigbatch.trainers.engine import read_back
from bigbatch.trainers.job import Job
from bigbatch.trainers.ledger.digest import from_limbs, of_int, to_limbs
from bigbatch.trainers.ledger.environment import environment
from bigbatch.trainers.ledger.lines import chained, last_chain, loss_bits
from bigbatch.trainers.ledger.multipliers import MASK, digest_samples
from bigbatch.trainers.ledger.state import StateDigests
from bigbatch.trainers.monitoring.log import Log


class LedgerWriter:
    """Digests the steps of one attempt. Every rank calls it in the same order."""

    def __init__(self, job: Job, log: Log) -> None:
        self._job, self._log, self._engine = job, log, job.engine
        self._every = job.recipe.log.ledger_every
        self._micro_batch = job.recipe.micro_batch
        self._index = job.inputs.splits.get("train")
        self._targets = learns_targets(job.recipe)
        self._keys = 0
        self._of_step: dict[str, str] = {}  # of the step that `agree` has seen last
        self._step: int | None = None  # that step, until the state after it is told
        self.state = StateDigests(job.engine)
        if self._every is None:
            return
        if job.engine.rank == 0:
            self._chain = last_chain(job.run.ledger)
            self._records = _Records(job)
            log.ledger(_start(job))

    def due(self, step: int) -> bool:
        """Whether `step` finished steps get a line."""
        if self._every is None:
            return False
        plan = self._job.inputs.plan
        return step % self._every == 0 or plan.saves_wherever_it_stops(step) or step == plan.total

    def see(self, batch: MicroBatch) -> None:
        """Take in which samples a micro-batch of this rank holds."""
        if not self.due(batch.step + 1):
            return
        places = batch.index * self._micro_batch + np.arange(len(batch.samples))
        labels, checksums = batch.labels.cpu().numpy(), None
        if self._index is not None:
            checksums = np.asarray(self._index.crc[batch.samples])
            if self._targets and batch.targets is not None:  # of others it is another sample
                rows = batch.targets.cpu().numpy()
                checksums = checksums ^ np.array([crc32c(row.tobytes()) for row in rows], np.uint32)
        self._keys += digest_samples(places, batch.samples, labels, checksums)

    def share(self, step: int, copies: Tensor | None) -> Tensor:
        """This rank's part of the all-reduce of the step that makes `step` finished ones.

        `copies` are the digests of the state as it is, where they are known (StateDigests).
        """
        parts = []
        if self.due(step):
            keys = of_int(self._keys & MASK, self._engine.device)
            self._keys = 0
            parts.append(to_limbs(torch.stack([keys, self.state.gradient()])).flatten())
        if self._step is not None:
            parts.append(to_limbs(self.state.state(copies)).flatten())
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)

    def agree(self, step: int, sums: Sequence[float], loss: float) -> None:
        """Take `share`, summed over ranks: write the step before, and keep this one's."""
        due = self.due(step)
        values = from_limbs(sums)
        if self._step is not None:
            self._write(values[2 if due else 0 :])
        if due:
            keys, gradient = (f"{value:016x}" for value in values[:2])
            self._of_step = {"keys": keys, "loss": loss_bits(loss), "gradient": gradient}

            self._step = step

    def save(self, copies: Tensor | None) -> None:
        """Complete the ledger up to the last step, for its checkpoint. Collective.

        `copies` as in `share`.
        """
        if self._every is None:
            return
        self.complete(copies)
        if self._engine.rank == 0 and (line := self._records.line(self._job.state.step)):
            self._log.ledger(line)

    def complete(self, copies: Tensor | None = None) -> None:
        """Tell the state after the last step, where no step of this attempt follows. Collective.

        `copies` as in `share`.
        """
        if self._step is not None:
            total = self._engine.sum(to_limbs(self.state.state(copies)).flatten())
            self._write(from_limbs(read_back({"sums": total})["sums"]))

    def _write(self, values: Sequence[int]) -> None:
        assert self._step is not None
        step, self._step = self._step, None
        names = "weights", "optimizer", "buffers"
        state = {name: f"{value:016x}" for name, value in zip(names, values, strict=True)}
        if self._engine.rank == 0:
            line = chained(self._chain, step, self._of_step | state)
            self._chain = line["chain"]
            self._log.ledger(line)


class _Records:
    """The SHA-256 of metrics.jsonl as it grows."""

    def __init__(self, job: Job) -> None:
        self._path = job.run.metrics
        self._hash = hashlib.sha256()
        self._bytes = 0

    def line(self, step: int) -> dict[str, object] | None:
        """What to note of the file now; None where it cannot be read, which stops no run."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._bytes)
                while block := file.read(1 << 20):
                    self._hash.update(block)
                    self._bytes += len(block)
        except OSError:
            return None
        digest = self._hash.hexdigest()
        return {"kind": "records", "step": step, "bytes": self._bytes, "sha256": digest}


def _start(job: Job) -> dict[str, object]:
    fingerprint = job.state.fingerprint
    train = job.inputs.splits.get("train")
    return {
        "kind": "start",
        "step": job.state.step,
        "world": job.engine.world,
        **environment(job.engine.device),
        "backend": job.recipe.backend,
        "data_hash": None if train is None else train.hash,
        "order_hash": fingerprint["order_hash"],
        "teacher_hash": fingerprint.get("teacher_hash"),
    }
