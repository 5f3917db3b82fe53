"""Submitting runs to SLURM: the run directory, its code and its batch script, then sbatch."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import iter_jsonl, to_json, write_atomically
from bigbatch.configs.json_text import parse_json
from bigbatch.configs.load import change_recipe
from bigbatch.configs.rundir import RunDir, create_run, event_record
from bigbatch.configs.schema import Recipe
from bigbatch.data.staging import is_url
from bigbatch.launcher.estimate import Finding
from bigbatch.launcher.slurm import squeue
from bigbatch.launcher.slurm.freeze import freeze_code
from bigbatch.launcher.slurm.script import (
    Job,
    check_options,
    is_array,
    render,
    run_in,
    run_paths,
)
from bigbatch.launcher.slurm.site_options import Site, read_site, site_file

SCRIPT = "job.sbatch"


def array_recipes(recipe: Recipe, job: Job, vary: Sequence[str] = ()) -> list[Recipe]:
    """The recipe of each run of an array.

    `vary` holds KEY=VALUE,VALUE,...: the run at place i takes the i-th value of each.
    Without it the runs differ by their seed: the recipe's seed plus the run's index.
    """
    if not job.indices:
        if vary:
            raise UserError("--vary needs --array, such as --array 0-2 for three values")
        return [recipe]
    if not vary:
        return [change_recipe(recipe, [f"seed={recipe.seed + i}"]) for i in job.indices]
    changes: list[list[str]] = [[] for _ in job.indices]
    for text in vary:
        key, _, values = text.partition("=")
        each = values.split(",")
        if len(each) != len(job.indices):
            raise UserError(
                f"--vary {text!r} holds {len(each)} values, --array {job.array} makes "
                f"{len(job.indices)} runs: give one value to each run"
            )
        for own, value in zip(changes, each, strict=True):
            own.append(f"{key}={value}")
    return [change_recipe(recipe, own) for own in changes]


def script_of(job: Job, path: Path, recipe: Recipe, mounts: Sequence[Path] = ()) -> str:
    """The batch script of a job that is submitted from the current folder."""
    data = recipe.data.path
    shards = [] if is_url(data) else [Path(data).absolute()]
    return render(job, path, Path.cwd(), mounts=(*shards, *mounts))


def make_job(recipe: Recipe, site: Site, **given: Any) -> Job:
    """A job from what a person gave, the site's defaults, and what follows from the recipe."""

    def first(name: str, default: Any = None) -> Any:
        values = (given.get(name), getattr(site, name, None), default)
        return next((value for value in values if value is not None), None)

    gpus = first("gpus_per_node", 0)
    # Decoding threads, and one core that feeds the GPU.
    cores = recipe.data.workers * recipe.data.threads + 1
    words = ("time", "partition", "account", "qos", "constraint", "container", "array", "after")
    return Job(
        nodes=first("nodes", "1"),
        ranks_per_node=first("ranks_per_node", max(1, gpus)),
        gpus_per_node=gpus,
        cpus_per_rank=first("cpus_per_rank", cores),
        lead=first("signal_lead", 120),
        options=(*site.sbatch_args, *given.get("options", ())),
        **{word: first(word) for word in words},
    )


def try_job(recipe: Recipe, nodes: int, ranks_per_node: int, runs: Path) -> Finding:
    """Whether sbatch would take a job of the site's defaults, and when it would start."""
    site = read_site(site_file())
    job = make_job(recipe, site, nodes=str(nodes), ranks_per_node=ranks_per_node)
    script = script_of(job, runs.absolute() / recipe.name, recipe)
    answer = squeue.would_start(script)
    if answer is None:
        return Finding("sbatch", "skipped", "not on this machine")
    accepted, text = answer
    return Finding("sbatch", "ok" if accepted else "warning", text)


def submit(recipes: Sequence[Recipe], job: Job, path: Path, mounts: Sequence[Path] = ()) -> str:
    """Create the runs, keep the code and the batch script in each, and hand that to sbatch.

    Returns the job's number. Raises UserError with sbatch's own words where it refuses;
    then no run is left behind.
    """
    path = path.absolute()
    script = script_of(job, path, recipes[0], mounts)
    made: list[RunDir] = []
    try:
        for own, recipe in zip(run_paths(job, path), recipes, strict=True):
            made.append(create_run(own, recipe))
            keep_code(made[-1])
            write_atomically(own / SCRIPT, script)
        number = squeue.submit(str(made[0].path / SCRIPT))
    except (UserError, OSError) as error:
        for run in made:
            shutil.rmtree(run.path, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"cannot write the run directory {path}: {error}") from None
        raise
    jobs = [f"{number}_{index}" for index in job.indices] or [number]
    unnoted: list[str] = []
    for run, own_number in zip(made, jobs, strict=True):
        try:
            note_job(run, own_number)
        except UserError as error:  # the others shall still know theirs
            unnoted.append(str(error))
    if unnoted:
        raise UserError("\n".join(unnoted))
    return number


def resubmit(run: RunDir, options: Sequence[str] = ()) -> str:
    """Hand a run's own batch script to sbatch again; returns the job's number."""
    check_options(options)
    script = run.path / SCRIPT
    if not script.is_file():
        raise UserError(
            f"{run.path} holds no {SCRIPT}: it was not made by `bigbatch submit`; go on with it "
            f"here by `bigbatch resume {run.path}`"
        )
    index = _array_index(run, script.read_text(encoding="utf-8"))
    arguments = [*options, f"--array={index}"] if index else list(options)
    number = squeue.submit(str(script), *arguments)
    number = f"{number}_{index}" if index else number
    note_job(run, number)
    return number


def _array_index(run: RunDir, script: str) -> str:
    """Which task of its script's array a run is; empty where that makes a single run.

    Raises UserError where the script trains another directory, as that of a copied run does.
    """
    index = ""
    if is_array(script):
        # The name says it also where no job could be noted.
        first = run_in(script, "")
        noted, name = job_of(run), run.path.resolve().name
        index = noted.partition("_")[2] if noted else name.removeprefix(first.name if first else "")
    trained = run_in(script, index)
    if trained is not None and not (trained.exists() and trained.samefile(run.path)):
        raise UserError(
            f"{run.path / SCRIPT} trains {trained}, not {run.path}, which was copied or moved; go "
            f"on with it here by `bigbatch resume {run.path}`, or move it back"
        )
    return index


def see_that_no_job_lives(run: RunDir) -> None:
    """Raise UserError where a run's SLURM job is still in the queue: two would write one run."""
    number = job_of(run)
    if number is None:
        return
    job = (squeue.find_jobs([number]) or {}).get(number)
    if job is not None and job.active:
        raise UserError(
            f"{run.name} is SLURM job {number}, {job.state.lower()}: it goes on by itself; "
            f"`bigbatch cancel {run.path}` ends it first"
        )


def keep_code(run: RunDir) -> None:
    """Copy the code into the run, and note its hash beside the git revision."""
    manifest = parse_json(run.manifest.read_bytes())
    manifest["code"] = freeze_code(run.path)
    write_atomically(run.manifest, to_json(manifest, indent=2) + "\n")


def note_job(run: RunDir, job: str) -> None:
    """Write into events.jsonl which job the run belongs to from now on.

    Raises UserError, with the job to cancel, where that cannot be written.
    """
    try:
        with run.events.open("a", encoding="utf-8") as file:
            file.write(to_json(event_record("submitted", 0, job=job)) + "\n")
    except OSError as error:
        raise UserError(
            f"SLURM has taken {run.path} as job {job}, which cannot be noted there: {error}; end "
            f"that job by `scancel {job}`, free some space, and submit the run again by "
            f"`bigbatch resume {run.path} --slurm`"
        ) from None


def job_of(run: RunDir) -> str | None:
    """The SLURM job that a run was submitted as last, such as 4711 or 4711_3 of an array.

    None for a copy of a run, whose records name the job of the original.
    """
    noted = iter_jsonl(run.events, b'"job"', newest_first=True)
    job = next((str(e["job"]) for e in noted if e.get("job")), None)
    if job is None:
        return None
    script = run.path / SCRIPT
    if script.is_file():
        trained = run_in(script.read_text(encoding="utf-8"), job.partition("_")[2])
        if trained is not None and trained.exists() and not trained.samefile(run.path):
            return None
    return job
