"""The proof of the one idea: a step is a pure function of (recipe, step number).

Runs the first steps of a recipe at several world sizes, then once more at one of them, shot
dead by SIGKILL at a random moment and started again. Compares what each step read (the
trace that workers write) and the weights that came out. Runs are real ones, in processes.
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import read_jsonl, to_json
from bigbatch.configs.load import parse_recipe
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.configs.schema import Recipe
from bigbatch.configs.words import plural
from bigbatch.launcher.child import OUTPUT, Children, RunFailed, steps_done, tail
from bigbatch.trainers.planning.inputs import open_inputs
from bigbatch.trainers.planning.plan import check_world

# float32 sums in another order differ by some of its 6e-8 spacing a step; ten steps of a
# network with BatchNorm amplify that to about 1e-6.
TOLERANCE = 1e-5
_SAVE_EVERY = 2

Trace = dict[tuple[int, int], tuple[int, ...]]  # (step, micro-batch) -> samples, in order


@dataclass(frozen=True)
class Result:
    """One compared run. `difference` is relative to the run that it is compared with."""

    ranks: int
    compared_with: str
    killed_at: int | None  # finished steps when it was killed
    resumed_from: int | None
    batches: int
    same_samples: bool
    difference: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.same_samples and self.difference <= self.limit


def prove(
    recipe: Recipe,
    folder: Path,
    *,
    steps: int = 10,
    ranks: Sequence[int] = (1, 2, 3, 4),
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> list[Result]:
    """Run the first `steps` steps at each world size in `folder`; compare with ranks[0].

    Raises UserError for world sizes that the recipe cannot have, RunFailed where a run fails.
    """
    if steps < 2:
        raise UserError(f"--steps {steps}: a run that is killed half-way needs at least 2")
    if not ranks or min(ranks) < 1 or len(set(ranks)) < len(ranks):
        raise UserError(f"--ranks {','.join(map(str, ranks))}: give different counts, 1 or more")
    if recipe.data.stream is not None:
        raise UserError(
            f"recipe {recipe.name} trains on data.stream, whose samples depend on the number of "
            "ranks: there is nothing to prove; index the tars and set data.path"
        )
    for count in ranks:
        check_world(recipe, count)
    if left_out := not_reached(recipe, steps):
        say(left_out)
    recipe = proof_recipe(recipe)

    finished: dict[int, RunDir] = {}
    # One thread per rank: the order of the sums inside a rank is then the same on any machine.
    with Children(1, threads=1) as children:
        for count in ranks:
            say(f"{plural(steps, 'step')} with {plural(count, 'rank')}")
            finished[count] = create_run(folder / f"ranks-{count}", recipe)
            run_to_end(finished[count], count, steps, children)
        count = next((c for c in ranks if c > 1), ranks[0])
        aim = random.Random(seed).randint(1, steps - 1)
        say(
            f"{plural(steps, 'step')} with {plural(count, 'rank')}, killed by SIGKILL after step "
            f"{aim} and resumed"
        )
        run = create_run(folder / "killed", recipe)
        killed_at = run_and_kill(run, count, steps, aim, children)
        resumed_from = _newest(run)
        run_to_end(run, count, steps, children)
    reference = finished[ranks[0]]
    results = [
        compare(
            finished[count], reference, ranks=count, with_=plural(ranks[0], "rank"), limit=TOLERANCE
        )
        for count in ranks[1:]
    ]
    undisturbed = f"{plural(count, 'rank')}, undisturbed"
    results.append(
        compare(
            run,
            finished[count],
            ranks=count,
            with_=undisturbed,
            limit=0.0,
            killed_at=killed_at,
            resumed_from=resumed_from,
        )
    )
    return results


def not_reached(recipe: Recipe, steps: int) -> str | None:
    """What the first `steps` steps do not show of a batch that changes; None where they do."""
    if isinstance(recipe.global_batch, int):
        return None
    plan = open_inputs(recipe).plan
    if plan.decide_every is not None:
        if (first := plan.first_decision) < steps:
            return None
        return (
            f"global_batch is decided on first at step {first:,}, which {plural(steps, 'step')} do "
            f"not reach; --steps {first + 2} does"
        )
    starts = plan.timeline.starts
    beyond = [start for start in starts if start >= steps]
    if not beyond:
        return None
    which = "changes" if len(beyond) == len(starts) - 1 else "changes again"
    return (
        f"global_batch {which} at step {beyond[0]:,}, which {plural(steps, 'step')} do not reach; "
        f"--steps {beyond[0] + 2} does"
    )


def proof_recipe(recipe: Recipe) -> Recipe:
    """The recipe with what a proof needs beside it; nothing that reaches a weight changes."""
    tree = recipe.model_dump(mode="json")
    tree["log"] |= {"trace": True, "wandb": "off", "every": 1}
    tree["checkpoint"] |= {"every": f"{_SAVE_EVERY} steps"}
    tree["phases"] = None  # each of them is a run, of steps as these
    return parse_recipe(tree, "of the proof")


def run_to_end(run: RunDir, ranks: int, steps: int, children: Children) -> None:
    """Train up to `steps`; raise RunFailed with the end of what was said where it fails."""
    status = children.start(run, steps, ranks).wait()
    if status != 0:
        raise RunFailed(
            f"training with {plural(ranks, 'rank')} ended with status {status}:\n{tail(run, 20)}"
        )


def run_and_kill(
    run: RunDir, ranks: int, steps: int, aim: int, children: Children, limit_s: float = 3600
) -> int:
    """Start training, and SIGKILL all its processes once `aim` steps are finished.

    Returns the number of steps that were finished at that moment.
    """
    child = children.start(run, steps, ranks)
    deadline = time.monotonic() + limit_s
    while steps_done(run) < aim and child.poll() is None:
        if time.monotonic() > deadline:
            child.kill()
            raise RunFailed(f"no step {aim} within {limit_s:.0f} s; see {run.path}/{OUTPUT}")
        time.sleep(0.005)
    at = steps_done(run)
    child.kill()
    return at


def compare(
    run: RunDir,
    reference: RunDir,
    *,
    ranks: int,
    with_: str,
    limit: float,
    killed_at: int | None = None,
    resumed_from: int | None = None,
) -> Result:
    trace = read_trace(run.trace)
    there, here = _last(reference), _last(run)
    # Weights, and their average where there is one; of a run with as many ranks, all state.
    names = {path.name for folder in (there, here) for path in folder.glob("*.safetensors")}
    names -= {"optimizer.safetensors"} if limit > 0 else set()
    pairs = [(here / name, there / name) for name in sorted(names)]
    return Result(
        ranks=ranks,
        compared_with=with_,
        killed_at=killed_at,
        resumed_from=resumed_from,
        batches=len(trace),
        same_samples=trace == read_trace(reference.trace),
        difference=max(relative_difference(a, b) for a, b in pairs),
        limit=limit,
    )


def read_trace(folder: Path) -> Trace:
    """What every micro-batch read, from the traces of all ranks.

    A resumed run reads the steps after its checkpoint twice. Raises RunFailed where it then
    read something else.
    """
    trace: Trace = {}
    for path in sorted(folder.glob("rank-*.jsonl")):
        for record in read_jsonl(path):
            place, samples = (record["step"], record["micro"]), tuple(record["samples"])
            if trace.setdefault(place, samples) != samples:
                raise RunFailed(
                    f"step {place[0]}, micro-batch {place[1]} was read twice, with different "
                    f"samples; see {folder}"
                )
    return trace


def relative_difference(path: Path, reference: Path) -> float:
    """The largest |a - b| of any tensor, relative to that tensor's largest |b|.

    0 is bit for bit: tensors are first compared by their bytes, so that NaN equals itself
    and -0 differs from 0. Infinity where names or shapes differ, a value is not finite, or one
    of the files is not there.
    """
    if not (path.is_file() and reference.is_file()):
        return float("inf")
    ours, theirs = load_file(path), load_file(reference)
    if {k: v.shape for k, v in ours.items()} != {k: v.shape for k, v in theirs.items()}:
        return float("inf")
    return max((_tensor_difference(a, theirs[name]) for name, a in ours.items()), default=0.0)


def _tensor_difference(a: Any, b: Any) -> float:
    if a.dtype == b.dtype and a.tobytes() == b.tobytes():
        return 0.0
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("inf")
    # The smallest positive number: not bit for bit, but no relative distance either (-0, 0).
    smallest = float(np.nextafter(0.0, 1.0))
    largest = float(np.abs(b).max())
    gap = float(np.abs(a - b).max())
    if gap == 0.0:
        return smallest
    return gap / largest if largest else float("inf")


def as_json(results: Sequence[Result], steps: int) -> str:
    rows = [asdict(r) | {"passed": r.passed} for r in results]
    proven = all(r.passed for r in results)
    return to_json({"proven": proven, "steps": steps, "results": rows}, indent=1)


def _checkpoints(run: RunDir) -> Iterator[Path]:
    return run.checkpoints.glob("step-????????")


def _newest(run: RunDir) -> int:
    return max((int(p.name[5:]) for p in _checkpoints(run)), default=0)


def _last(run: RunDir) -> Path:
    return max(_checkpoints(run))
