"""The workers of a run with phases: where they are, and which are still to be trained."""

from bigbatch.configs.rundir import RunDir, member_paths
from bigbatch.configs.schema import Recipe


def worker_runs(trunk: RunDir, recipe: Recipe) -> list[RunDir]:
    """NAME-worker-0, ... beside the trunk NAME, there or not; none of a run without phases."""
    count = 0 if recipe.phases is None else recipe.phases.workers
    path = trunk.path if trunk.path.name else trunk.path.absolute()  # "." has no name
    return [RunDir(each) for each in member_paths(path.with_name(f"{path.name}-worker"), count)]


def unfinished(trunk: RunDir, recipe: Recipe) -> list[RunDir]:
    """Those that are not finished branches of this very run."""
    here = str(trunk.path.absolute())
    return [
        run
        for run in worker_runs(trunk, recipe)
        if (run.forked_from or {}).get("run") != here or not run.summary.exists()
    ]
