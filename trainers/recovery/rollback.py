"""Going back from steps that went wrong, and stepping over them in the next try.

A loss that leaps or is not finite shows after the harm is done: the cause lies in one of the
steps before it. The run therefore goes back to a checkpoint from before those steps, makes no
update in them, and goes on. Source: Chowdhery et al., PaLM, 2022, section 5.1. Which steps are
stepped over stands in events.jsonl and in each checkpoint, so that every later start leaves
out the same ones, and the weights stay a function of what the run directory holds.
"""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import iter_jsonl
from bigbatch.configs.json_text import parse_json
from bigbatch.configs.recovery import Recovery, Spike
from bigbatch.configs.rundir import RunDir
from bigbatch.trainers.recovery.stored import STATE, list_checkpoints, remove, step_of

Range = list[int]  # the first and the last step, as counted before them, that make no update

_NORMAL = 1.4826  # median absolute deviation to standard deviation, of a normal distribution


class Rollback(Exception):
    """Raised by the loop on all ranks alike, before the update of a step that went wrong."""

    def __init__(self, why: str, steps: Range, loss: float, norm: float) -> None:
        super().__init__(why)
        self.steps, self.loss, self.norm = steps, loss, norm


class StepFailed(UserError):
    """A step went wrong, and nothing is left to be done about it."""

    def __init__(self, why: str, step: int, loss: float, norm: float, *, leaps: bool) -> None:
        """`leaps`: all is finite, and the loss too high."""
        super().__init__(why)
        self.step, self.loss, self.norm, self.leaps = step, loss, norm, leaps


def spikes(loss: float, earlier: Sequence[float], config: Spike) -> bool:
    """Whether `loss` leaps out of the `earlier` ones, the newest last.

    Both must hold: it is above `factor` times their median, and above the median by
    `deviations` robust standard deviations. With less than a window of them nothing spikes.
    """
    window = earlier[-config.window :]
    if len(window) < config.window:
        return False
    middle = statistics.median(window)
    spread = _NORMAL * statistics.median(abs(x - middle) for x in window)
    return loss > config.factor * middle and loss > middle + config.deviations * spread


def check_step(
    recovery: Recovery,
    step: int,
    loss: float,
    norm: float,
    *,
    not_finite: Sequence[str] = (),
    earlier: list[float],
    skipped_steps: list[Range],
    may_overflow: bool,
) -> bool:
    """Whether this step makes its update. Raises Rollback or UserError where it went wrong.

    `earlier` holds the losses of the steps before, and takes this one in; `skipped_steps`
    holds what is stepped over already. All are the same on every rank, and so is the result.
    With `may_overflow` (fp16) a loss or norm that is not finite makes no update, and is no
    mistake. `not_finite` names running statistics that the step would spoil.
    """
    overflowed = not (math.isfinite(loss) and math.isfinite(norm))
    finite = not overflowed and not not_finite
    if is_skipped(skipped_steps, step):
        return False
    if finite and not (recovery.spike and spikes(loss, earlier, recovery.spike)):
        if recovery.spike:
            earlier.append(loss)
            del earlier[: -recovery.spike.window]
        return True
    if overflowed and may_overflow:
        return False
    why = f"step {step}: loss {loss:.6g}, gradient norm {norm:.6g}"
    if not_finite:
        more = f" and {len(not_finite) - 1} more running statistics" if not_finite[1:] else ""
        why += f", {not_finite[0]}{more} not finite"
    if finite:
        why += f", a spike over the median {statistics.median(earlier):.6g}"
    if len(skipped_steps) >= recovery.max_rollbacks:
        tried = f" after {len(skipped_steps)} rollbacks" if skipped_steps else ""
        raise StepFailed(
            f"{why}{tried}; the weights were not touched. Lower optimizer.lr, lengthen "
            "schedule.warmup, or set clip, then start a new run; or let it step over the bad "
            "steps by recovery.max_rollbacks",
            step,
            loss,
            norm,
            leaps=finite,
        )
    raise Rollback(why, [max(0, step + 1 - recovery.skip_steps), step], loss, norm)


def is_skipped(skipped_steps: list[Range], step: int) -> bool:
    return any(first <= step <= last for first, last in skipped_steps)


def read_rollbacks(run: RunDir) -> list[Range]:
    """The steps to be stepped over, from events.jsonl, oldest first."""
    events = iter_jsonl(run.events, b'"rollback"')
    return [[int(e["first"]), int(e["last"])] for e in events if e.get("kind") == "rollback"]


def remove_stale(folder: Path, skipped_steps: list[Range]) -> None:
    """Remove the checkpoints whose weights took in one of the `skipped_steps`.

    Raises UserError, and removes nothing, where none from before those steps is left.
    """
    paths = list_checkpoints(folder)
    stale = [p for p in paths if _is_stale(p, skipped_steps)]
    if stale and len(stale) == len(paths):
        raise UserError(
            f"no checkpoint in {folder} is from before step {skipped_steps[-1][0]}, to go back to; "
            "set checkpoint.keep higher, then start a new run"
        )
    for path in stale:
        remove(path)


def _is_stale(path: Path, skipped_steps: list[Range]) -> bool:
    missed = [steps for steps in skipped_steps if step_of(path) > steps[0]]
    if not missed:
        return False
    try:
        known = parse_json((path / STATE).read_bytes())["over"]
    except (OSError, ValueError, KeyError, TypeError):
        return True
    return any(steps not in known for steps in missed)
