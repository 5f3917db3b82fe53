"""What the loop works with in a replay, in place of what would write: nothing of a run changes."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import finite
from bigbatch.configs.judged import judged_by
from bigbatch.configs.rundir import RunDir
from bigbatch.configs.schema import Recipe
from bigbatch.trainers.attempt import Attempt
from bigbatch.trainers.engine.ddp import DdpEngine
from bigbatch.trainers.monitoring.log import Log
from bigbatch.trainers.planning.plateau import Evaluation
from bigbatch.trainers.recovery.checkpoint import TrainState
from bigbatch.trainers.recovery.saving import Saver
from bigbatch.trainers.recovery.signals import StopFlag
from bigbatch.trainers.recovery.watchdog import Watchdog
from bigbatch.trainers.replay.past import Past, Record

_KEPT = 1000  # steps, of which norms by parameter are kept


class WatchedEngine(DdpEngine):
    """One process that keeps, of the last steps' mean gradients, the norms by parameter, and with
    `keeps` the gradient itself, by name, until the next step."""

    keeps = False

    def __init__(self, precision: str, reduction: str, *, deterministic: bool) -> None:
        super().__init__(precision, reduction, deterministic=deterministic)
        self.by_parameter: deque[dict[str, float]] = deque(maxlen=_KEPT)
        self.gradient: dict[str, Tensor] = {}

    def gradient_norm(self) -> Tensor:
        norm = super().gradient_norm()
        found = {n: p.grad for n, p in self.own_weights().items() if p.grad is not None}
        lengths = torch.stack([torch.linalg.vector_norm(g).double() for g in found.values()])
        self.by_parameter.append(dict(zip(found, lengths.tolist(), strict=True)))
        if self.keeps:
            self.gradient = {name: g.detach().clone() for name, g in found.items()}
        return norm


class Notes(Log):
    """A log that keeps in memory what the loop says of its steps, and has no file."""

    def __init__(
        self,
        run: RunDir,
        recipe: Recipe,
        total_steps: int,
        epoch_samples: int,
        on_step: Callable[[], object],
    ) -> None:
        super().__init__(
            run,
            recipe,
            total_steps=total_steps,
            epoch_samples=epoch_samples,
            metrics=None,
            events=None,
            progress=None,
            wandb=None,
        )
        self.trained: dict[int, Record] = {}
        self.details: dict[tuple[int, str], Record] = {}
        self.events: list[Record] = []
        self.lines: dict[int, Record] = {}  # of the ledger, by step
        self._on_step = on_step

    def train(self, step: int, **values: Any) -> None:
        self.trained[step] = finite(values)
        self._on_step()

    def detail(self, step: int, kind: str, **values: Any) -> None:
        self.details[step, kind] = finite(values)

    def ledger(self, line: Record) -> None:
        if line["kind"] == "step":
            self.lines[line["step"]] = line

    def event(self, kind: str, **fields: Any) -> None:
        self.events.append(finite({"kind": kind, **fields}))


class NoSaver(Saver):
    def __init__(self) -> None:
        pass

    def save(
        self,
        state: TrainState,
        *,
        check: Callable[[], None] | None = None,
        score: float | None = None,
        last: bool = False,
    ) -> None:
        if check is not None:
            check()

    def report(self) -> None:
        pass


class NoWatchdog(Watchdog):
    def __init__(self) -> None:
        pass

    def beat(self, step: int, doing: str) -> None:
        pass


class NoSignal(StopFlag):
    def __init__(self) -> None:
        self.signal = None


@dataclass(frozen=True)
class Replaying(Attempt):
    """An attempt whose evaluations are those on record: what follows from them does so again."""

    past: Past | None = None

    def grows(self, step: int) -> bool:
        raise UserError(
            f"{self.job.run.name} has no event of what it decided about its batch after step "
            f"{step}: events.jsonl is not what it was, and no later step can be had again"
        )

    def evaluate(self, *, snapshot: bool = False) -> dict[str, float]:
        state, course = self.job.state, self.job.course
        assert self.past is not None
        known = [e for e in self.past.evaluations if e.step == state.step]
        if course.costs is not None and state.step in self.past.confusions:
            course.costs.update(self.past.confusions[state.step])
        scores = dict(known[-1].scores) if known else {}
        state.evaluations.append(Evaluation(state.step, scores))
        unknown = {judged_by(self.job.recipe).key: float("nan")}
        return unknown | {k: v for k, v in scores.items() if v is not None}
