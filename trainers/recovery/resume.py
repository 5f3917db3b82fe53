"""Where a start goes on: the lock on the run first, then the newest checkpoint that serves."""

import sys
from pathlib import Path

from bigbatch.configs.decisions import KIND, Decisions, read_decisions
from bigbatch.configs.errors import UserError
from bigbatch.configs.rundir import RunDir, check_layout, remove_leftovers
from bigbatch.trainers.engine import Engine
from bigbatch.trainers.monitoring.log import last_step
from bigbatch.trainers.planning.plateau import Evaluation, read_evaluations
from bigbatch.trainers.recovery.checkpoint import TrainState, load_checkpoint
from bigbatch.trainers.recovery.heartbeat import Heartbeat
from bigbatch.trainers.recovery.rollback import Range, read_rollbacks, remove_stale
from bigbatch.trainers.recovery.stored import newest_valid


def acquire_run_lock(run: RunDir, engine: Engine) -> Heartbeat:
    """This rank's heartbeat. Rank 0's is the lock on the run; UserError where another has it."""
    engine.on_main(lambda: check_layout(run))
    heartbeat: Heartbeat | None = None
    refused: UserError | None = None
    try:
        heartbeat = Heartbeat(run.heartbeats, engine.rank)
    except OSError as error:
        refused = _cannot_write(run, error)

    def lock() -> None:
        if heartbeat is None:
            raise refused or AssertionError
        try:
            heartbeat.lock()
            remove_leftovers(run)
        except OSError as error:
            raise _cannot_write(run, error) from None

    engine.on_main(lock)
    if heartbeat is None:  # this machine alone cannot write there
        raise refused or AssertionError
    return heartbeat


def _cannot_write(run: RunDir, error: OSError) -> UserError:
    return UserError(f"cannot write in {run.path}: {error}; free some space or fix the permissions")


def resume(run: RunDir, engine: Engine, state: TrainState, every: int) -> list[str]:
    """Fill `state` from where the run can go on; the order is:

    1. the newest checkpoint in the run directory that verifies and whose steps all have their
       record in metrics.jsonl, one `every` so many steps,
    2. the newest one that verifies,
    3. with no checkpoint at all, step 0 with the model as built; of a branch, nowhere.

    Rank 0 chooses, so that all ranks load the same one. Returns what is wrong with the ones
    that were passed over.
    """

    def choose() -> tuple[str | None, list[str], list[Range]]:
        origin = run.forked_from
        branched = origin["at"] if origin else 0  # of the steps before it has no records
        recorded = max(last_step(run.metrics), branched)
        skipped = read_rollbacks(run)
        remove_stale(run.checkpoints, skipped)

        def objection(step: int) -> str | None:
            if recorded >= step - step % every:
                return None
            return f"{run.metrics} ends after step {recorded}"

        path, errors = newest_valid(run.checkpoints, objection)
        if path is None and origin:
            raise UserError(
                f"{run.checkpoints} holds no checkpoint, and {run.path} began as a branch of "
                f"{origin.get('run')} at step {branched}; branch off again with `bigbatch fork`"
            )
        for error in errors:
            print(f"bigbatch: {error}; going on from an older one", file=sys.stderr)
        return str(path) if path else None, errors, skipped

    chosen, errors, skipped = engine.on_main(choose)
    if chosen:
        load_checkpoint(Path(chosen), state)
    elif state.step > 0:
        raise UserError(f"{run.checkpoints} holds nothing to go back to; resume the run")
    state.skipped_steps += [steps for steps in skipped if steps not in state.skipped_steps]
    # The truth is the file; every rank takes rank 0's reading of it.
    found = engine.on_main(lambda: read_evaluations(run.metrics, state.step))
    state.evaluations[:] = [Evaluation(*evaluation) for evaluation in found]
    return errors


def agreed_decisions(run: RunDir, engine: Engine, state: TrainState) -> Decisions:
    """What the run has decided about its batch, by rank 0's reading of it. Collective.

    Events are on the disk before a step follows from them, and every checkpoint holds all that
    were when it was written. Raises UserError where events.jsonl does not have these.
    """
    found = engine.on_main(lambda: read_decisions(run))
    decided = [(samples, batch) for samples, batch in found]
    if lost := [decision for decision in state.decided if decision not in decided]:
        samples, batch = lost[0]
        raise UserError(
            f"{run.events} has no event {KIND} of global_batch {batch} at {samples:,} samples, "
            f"which step {state.step} follows from; put the file back as it was, or start a new run"
        )
    state.decided[:] = decided
    return decided
