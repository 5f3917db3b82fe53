"""Saving: every rank captures its state, rank 0 writes it."""

from pathlib import Path

from bigbatch.configs.errors import UserError
from bigbatch.configs.schema import Checkpoint
from bigbatch.trainers.checkpoint import Capture, TrainState, capture, write
from bigbatch.trainers.engine import Engine
from bigbatch.trainers.log import Log


class Saver:
    """Writes the checkpoints of one attempt of a run into `folder`."""

    def __init__(self, folder: Path, engine: Engine, log: Log, config: Checkpoint) -> None:
        self._folder = folder
        self._engine = engine
        self._log = log
        self._config = config
        self._captured: Capture | None = None

    def save(self, state: TrainState) -> None:
        """Collective: rank 0 writes, then every rank learns whether it went well."""
        captured = self._capture(state)
        problem = None
        if captured is not None:
            try:
                write(self._folder, captured, self._config.keep, self._log.sync)
            except OSError as error:
                problem = f"cannot save step {state.step} in {self._folder}: {error}"
        problem = self._engine.from_main(problem)
        if problem:
            raise UserError(f"{problem}; free some space or fix the permissions, then resume")

    def _capture(self, state: TrainState) -> Capture | None:
        """Rank 0's copy of the state; None elsewhere. Every rank calls it in the same step."""
        if self._engine.rank == 0:
            self._captured = capture(state, self._captured)
        return self._captured
