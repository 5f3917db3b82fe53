"""What a run measures of itself beside the loss: time by phase and rank, MFU, trust ratios.

Each step's record gets the mean phases, the straggler and the MFU. What is larger (phases by
rank, trust ratios by layer, the machine) is recorded every `log.details_every` steps.
"""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from bigbatch.configs.schema import Recipe
from bigbatch.trainers.engine import Engine
from bigbatch.trainers.monitoring.flops import flops_per_image, peak_flops
from bigbatch.trainers.monitoring.log import Log
from bigbatch.trainers.monitoring.phases import PHASES, Clock, Timings
from bigbatch.trainers.monitoring.system import System
from bigbatch.trainers.optim import trust_ratios


class Monitor:
    """The clock of one rank, and on rank 0 what all of them say."""

    def __init__(
        self, log: Log, engine: Engine, recipe: Recipe, classes: int, shards: Sequence[str]
    ) -> None:
        self.clock = Clock(engine.device, engine.rank, engine.world)
        engine.on_sent = self.clock.sent
        self._log, self._engine = log, engine
        self._every = recipe.log.details_every
        self._timings = Timings(engine.world)
        self._shards = shards
        self._system = System(engine.device)
        self.gradients: dict[str, float] | None = None  # norms by weight, where a step has them
        self.flops: int | None = None  # of one image, forward and backward
        self.peak: float | None = None  # FLOP/s of all ranks' devices together
        if engine.rank == 0:
            self.flops = flops_per_image(recipe, classes)  # while images grow, of the last ones
            peak = peak_flops(engine.device, recipe.precision)
            self.peak = peak * engine.world if peak else None
        self._grows = recipe.data.progressive is not None

    def table(self, step: int) -> Tensor:
        """This rank's part of what `step` finished steps will record: empty where nothing."""
        table = self.clock.table if self._log.due(step) else self.clock.nothing
        return table()

    def record(self, table: Sequence[float], images_per_s: float) -> dict[str, Any]:
        """What to record of a step, from the table summed over ranks."""
        if not table:
            return {}
        self._timings.add(table)
        values: dict[str, Any] = {}
        if phases := self._timings.mean():
            values["phases"] = {name: round(seconds, 6) for name, seconds in phases.items()}
        if slowest := self._timings.slowest():
            values["slowest"] = {
                "rank": slowest.rank,
                "phase": slowest.phase,
                "share": round(slowest.share, 4),
            }
            if slowest.shard is not None:
                values["slowest"]["shard"] = self._shards[slowest.shard]
        if self.flops and self.peak and not self._grows:
            values["mfu"] = self.flops * images_per_s / self.peak
        return values

    def details(self, step: int) -> None:
        """Record phases by rank, norms and trust ratios by layer, the machine, where due."""
        if self.gradients is not None:
            self._log.detail(step, "gradients", norms=self.gradients)
            self.gradients = None
        if self._engine.rank or step % self._every:
            return
        seconds = self._timings.seconds
        if seconds is not None:
            rows = seconds.round(6).tolist()
            self._log.detail(step, "ranks", phases=list(PHASES), seconds=rows)
        # Waits for this step's update: once in so many steps, and one copy for all layers.
        pieces = self._engine.pieces
        names = self._engine.module if pieces is None else pieces.names
        if ratios := trust_ratios(self._engine.optimizer, names):
            finite = {name: r if math.isfinite(r) else None for name, r in ratios.items()}
            self._log.detail(step, "trust", ratios=finite)
        self._log.detail(step, "system", **self._system.sample())
