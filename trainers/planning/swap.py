"""The workers of a run with phases: where they are, and which are still to be trained."""

from pathlib import Path

from bigbatch.configs.rundir import RunDir, member_paths
from bigbatch.configs.schema import Recipe


def worker_runs(trunk: RunDir, recipe: Recipe) -> list[RunDir]:
    """NAME-worker-0, ... beside the trunk NAME, there or not; none of a run without phases."""
    count = 0 if recipe.phases is None else recipe.phases.workers
    path = trunk.path if trunk.path.name else trunk.path.absolute()  # "." has no name
    return [RunDir(each) for each in member_paths(path.with_name(f"{path.name}-worker"), count)]


def unfinished(trunk: RunDir, recipe: Recipe) -> list[RunDir]:
    """Those that are not finished branches of this very run."""
    return [
        run
        for run in worker_runs(trunk, recipe)
        if not branched_off(run, trunk) or not run.summary.exists()
    ]


def branched_off(run: RunDir, parent: RunDir) -> bool:
    """Whether a run is a branch of the one that is at this place, however that is spelt."""
    origin = run.forked_from
    return origin is not None and Path(str(origin.get("run"))).resolve() == parent.path.resolve()
