"""What ranks hold and compute alike, compared, so that no step is made of bits gone wrong.

Copies: what each rank has a whole copy of (weights, optimizer state, running statistics) is
digested after the passes of a step and before its update, and at a save before it is written. A
rank whose digest is another one made another update before, or its memory has changed since; the
gradients of this step, made with it, get nowhere.

Gradients: trainers/corruption/swapped.py.
"""

import socket
from collections.abc import Sequence
from typing import Any, NoReturn

from torch import Tensor, zeros
from torch import float64 as f64

from bigbatch.configs.errors import UserError
from bigbatch.configs.notices import notice
from bigbatch.configs.words import plural
from bigbatch.data.batch import MicroBatch
from bigbatch.trainers.corruption.swapped import Swapped, from_rows, in_row, why_not
from bigbatch.trainers.corruption.vote import judge, outvoted
from bigbatch.trainers.engine import read_back
from bigbatch.trainers.job import Job
from bigbatch.trainers.ledger.environment import environment
from bigbatch.trainers.ledger.record import LedgerWriter
from bigbatch.trainers.monitoring.log import Log

_NAMED = 3  # tensors in a message; an event has more
_LISTED = 50
_SHOWN = 8  # ranks, likewise


class Corrupted(UserError):
    """A rank holds or computes other bits than the others; raised on all ranks alike."""


class CorruptionCheck:
    """Looks for silent data corruption in the steps of one attempt. All ranks call it alike."""

    def __init__(self, job: Job, log: Log, ledger: LedgerWriter) -> None:
        config = job.recipe.recovery.corruption
        engine = self._engine = job.engine
        self._job, self._log, self._ledger = job, log, ledger
        self._every = config.digest_every if engine.world > 1 else None
        self._swapped: Swapped | None = None
        self._fresh = True  # nothing of this attempt has been compared yet
        if self._every is None and config.recompute_every is None:
            return
        ids = engine.gather_values(environment(engine.device)["environment"])
        alike = len(set(ids)) == 1
        if self._every is not None and not alike:
            self._every = None
            self._say_off("digests of ranks", "ranks have unlike devices, versions or settings")
        if config.recompute_every is not None:
            if reason := why_not(job, alike=alike):
                self._say_off("gradients of two ranks", reason)
            else:
                self._swapped = Swapped(job, config.recompute_every)

    def _say_off(self, what: str, reason: str) -> None:
        if self._engine.rank == 0:
            notice(f"{what} are not compared (recovery.corruption): {reason}")

    def begin(self, step: int, micro_batches: int) -> None:
        """Begin the step after `step` finished ones."""
        self._step = step
        if self._swapped is not None:
            self._swapped.begin(step, micro_batches)

    def see(self, batch: MicroBatch) -> None:
        """Take in a micro-batch of this rank that is about to be computed."""
        if self._swapped is not None:
            self._swapped.see(batch)

    def recompute(self) -> None:
        """Compute another rank's micro-batch, in steps that compare one."""
        if self._swapped is not None:
            self._swapped.recompute()

    def copies(self) -> Tensor | None:
        """Digests of this rank's copies before an update, where they are to be compared."""
        if self._every is None:
            return None
        if isinstance(self._every, int):
            due = self._step % self._every == 0
        else:  # as the ledger
            due = self._ledger.due(self._step)
        due = due or self._fresh or (self._swapped is not None and self._swapped.due)
        return self._ledger.state.copies() if due else None

    def share(self, copies: Tensor | None) -> Tensor:
        """This rank's part of copies in the step's all-reduce."""
        if copies is None:
            return zeros(0, dtype=f64)
        return in_row(copies.sum()[None], self._engine.rank, self._engine.world)

    def share_gradients(self) -> Tensor:
        """This rank's part of gradients in the step's all-reduce."""
        return zeros(0, dtype=f64) if self._swapped is None else self._swapped.share()

    def agree(self, copies: Sequence[float], gradients: Sequence[float]) -> None:
        """Take both, summed over ranks, before anything is made of the step. Raises Corrupted."""
        if copies:
            self._fresh = False
            self._agree_on_copies(copies)
        if self._swapped is not None and (pairs := self._swapped.differing(gradients)):
            self._name_gradients(self._swapped, pairs)

    def compare(self, step: int) -> Tensor | None:
        """Compare copies after `step` finished steps, before they are kept. Collective.

        Returns the digests of this rank's, or None where they are not compared. Raises Corrupted.
        """
        if self._every is None:
            return None
        self._step = step
        copies = self._ledger.state.copies()
        sums = self._engine.sum(self.share(copies).to(self._engine.device))
        self._agree_on_copies(read_back({"copies": sums})["copies"])
        return copies

    def _agree_on_copies(self, sums: Sequence[float]) -> None:
        digests = [row[0] for row in from_rows(sums, 1)]
        if len(set(digests)) > 1:
            self._name_copies(digests)

    def _name_copies(self, digests: list[int]) -> None:
        mine = self._ledger.state.each_copy()
        told = self._engine.gather_values(self._told(list(mine.values())))
        guilty = outvoted(digests)
        tensors = _differing(list(mine), [one["found"] for one in told])
        where = f"step {self._step}: silent data corruption: "
        if guilty:
            others = len(digests) - len(guilty)
            text = (
                f"{_ranks(guilty, told)} {'holds' if len(guilty) == 1 else 'hold'} other bits than "
                f"the {others} others of {_some(tensors)}"
            )
        else:
            text = (
                f"{_ranks(range(len(digests)), told)} hold different bits of {_some(tensors)}, and "
                "no majority says which are right"
            )
            if self._step:
                command = f"bigbatch replay {self._job.run.path} --step {self._step}"
                text += f" (`{command}` does)"
        self._end(
            where + text,
            found="copies",
            ranks=guilty or [*range(len(digests))],
            known=bool(guilty),
            tensors=tensors[:_LISTED],
            digests=[f"{digest:016x}" for digest in digests],
            copied=self._ledger.state.copied,
            told=told,
        )

    def _name_gradients(self, swapped: Swapped, pairs: list[tuple[int, int]]) -> None:
        again = [swapped.again(owner) for owner, _ in pairs]
        told = self._engine.gather_values(self._told(swapped.found()) | {"again": again})
        guilty: set[int] = set()
        tensors: list[str] = []
        texts = []
        for number, (owner, checker) in enumerate(pairs):
            own, checked = told[owner]["found"]["own"], told[checker]["found"]["checked"]
            once_more = [tuple(one["again"][number]) for one in told]
            wrong = judge(owner, checker, tuple(own), tuple(checked), once_more)
            guilty |= set(wrong)
            differ = _differing(swapped.names, [own, checked])
            tensors += [name for name in differ if name not in tensors]
            text = f"the gradient of micro-batch {swapped.micro_batch(owner)} came out otherwise "
            text += f"on rank {checker} than on rank {owner}" if checker != owner else "once more"
            text += f", in {_some(differ)}"
            if told[owner]["found"]["pixels"][0] != told[checker]["found"]["pixels"][1]:
                text += ", from other pixels, as read and decoded"
            if not wrong:
                steady = once_more[owner] == tuple(own) and once_more[checker] == tuple(checked)
                text += f" ({'each' if steady else 'neither'} repeats itself)"
            texts.append(text)
        where = f"step {self._step}: silent data corruption: "
        named = sorted(guilty)
        suspects = named or sorted({rank for pair in pairs for rank in pair})
        says = f"{_ranks(suspects, told)} " + (
            "computed wrongly" if named else "compute differently, and which is right nobody says"
        )
        self._end(
            f"{where}{says}: {'; '.join(texts)}",
            found="gradient",
            ranks=suspects,
            known=bool(named),
            micro_batches=[swapped.micro_batch(owner) for owner, _ in pairs],
            tensors=tensors[:_LISTED],
            told=told,
        )

    def _told(self, found: Any) -> dict[str, Any]:
        """What a rank says of itself, beside what it found."""
        return {"host": socket.gethostname(), "device": str(self._engine.device), "found": found}

    def _end(
        self, text: str, *, told: list[dict[str, Any]], ranks: list[int], **fields: Any
    ) -> NoReturn:
        hosts = [f"{told[rank]['host']} {told[rank]['device']}" for rank in ranks]
        self._log.event(
            "corruption", step=self._step, error=text, ranks=ranks, hosts=hosts, **fields
        )
        raise Corrupted(
            f"{text}. After that no update was made and nothing saved. Take the machine or device "
            f"out, or test it, then `bigbatch resume {self._job.run.path}` (docs/corruption.md)"
        )


def _differing(names: Sequence[str], found: Sequence[Sequence[int]]) -> list[str]:
    """Names of what is not the same in all; all of them where some have others."""
    if len({len(one) for one in found}) > 1:
        return list(names)
    return [name for name, *values in zip(names, *found, strict=True) if len(set(values)) > 1]


def _ranks(ranks: Sequence[int], told: Sequence[dict[str, Any]]) -> str:
    """`rank 1 (node7, cuda:3)`, and so on."""
    each = [f"{rank} ({told[rank]['host']}, {told[rank]['device']})" for rank in ranks]
    more = f" and {len(each) - _SHOWN} more" if len(each) > _SHOWN else ""
    return f"rank{'s' if len(each) > 1 else ''} {', '.join(each[:_SHOWN])}{more}"


def _some(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {plural(more, 'more tensor')}" if more > 0 else "")
