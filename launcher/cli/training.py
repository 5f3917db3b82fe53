"""Commands that start runs, and that look at them."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from bigbatch.launcher.cli import options
from bigbatch.launcher.launchers import LAUNCHERS

if TYPE_CHECKING:
    from bigbatch.configs.rundir import RunDir

F = TypeVar("F", bound=Callable[..., Any])


def _starts(function: F) -> F:
    """Arguments and options of what starts a run here; all of them belong to `_start`."""
    for option in (
        options.as_json,
        options.runs_folder,
        options.new_run,
        click.option(
            "--hostfile",
            type=click.Path(path_type=Path, exists=True),
            help="deepspeed: its machines.",
        ),
        click.option(
            "--node-rank", type=click.IntRange(0), help="accelerate: number of this machine."
        ),
        click.option(
            "--rdzv-endpoint", "--rdzv", help="With --nnodes: HOST:PORT of one of the machines."
        ),
        click.option("--nnodes", default="1", help="Machines that start alike; or MIN:MAX."),
        click.option(
            "--launcher",
            type=click.Choice(LAUNCHERS),
            default="torchrun",
            show_default=True,
            help="What starts the processes.",
        ),
        click.option(
            "--at-once",
            type=click.IntRange(1),
            help="With --members, or workers of phases: so many side by side; default: 1.",
        ),
        click.option(
            "--members",
            type=click.IntRange(2),
            help="Train so many runs NAME-0, NAME-1, ... by seed.",
        ),
        click.option(
            "--nproc", type=click.IntRange(1), help="Processes here; default: one per GPU."
        ),
        options.recipe,
    ):
        function = option(function)
    return function


@click.command(short_help="Train here, or take part where a launcher started this.")
@_starts
def train(recipe: str, overrides: tuple[str, ...], **where: Any) -> None:
    """Train RECIPE, a built-in name or a YAML file, with KEY=VALUE changes to it.

    \b
    bigbatch train digits --nproc 2
    bigbatch train digits --nproc 2 optimizer.lr=4 schedule.cycles=2

    Started once, it starts its processes itself. Started by torchrun, accelerate launch,
    deepspeed or srun, each process takes part as the rank it was given. With --members K the
    recipe is trained with K seeds, as runs that `bigbatch ensemble` combines. Where the recipe has
    phases, RUN is the trunk: its workers RUN-worker-0, ... and their average follow by themselves.
    """
    _start(recipe, overrides, **where)


@click.command(short_help="Train a student of a run or an ensemble.")
@_starts
@click.option("--teacher", required=True, metavar="RUN|FOLDER", help="Who teaches.")
def distill(recipe: str, overrides: tuple[str, ...], teacher: str, **where: Any) -> None:
    """Train RECIPE as `train` does, learning from a teacher's outputs as well as from labels.

    \b
    bigbatch distill digits --teacher digits
    bigbatch distill digits --teacher ensembles/five distill.temperature=2 --nproc 2

    RUN is a name or a directory, whose members are combined by their mean; FOLDER is what
    `bigbatch ensemble` has written. It is the recipe's key distill.teacher, and the other keys
    of distill may be set as any.
    """
    _start(recipe, overrides, teacher, **where)


def _start(
    recipe: str,
    overrides: tuple[str, ...],
    teacher: str | None = None,
    *,
    nproc: int | None,
    launcher: str,
    nnodes: str,
    rdzv_endpoint: str | None,
    node_rank: int | None,
    hostfile: Path | None,
    members: int | None,
    at_once: int | None,
    run: str | None,
    run_dir: Path | None,
    runs_folder: Path,
    as_json: bool,
) -> None:
    from bigbatch.configs.errors import UserError
    from bigbatch.configs.load import load_recipe
    from bigbatch.configs.notices import notice
    from bigbatch.configs.rundir import RunDir
    from bigbatch.data.measured import with_measured
    from bigbatch.launcher import start
    from bigbatch.launcher.cli import result
    from bigbatch.launcher.env import cpus_per_task, find_peers
    from bigbatch.launcher.launchers import Launch
    from bigbatch.launcher.members import member_paths, run_members
    from bigbatch.launcher.phases import check_new, check_starts_here, train_phases
    from bigbatch.launcher.runs import registry

    peers = find_peers(os.environ)
    start.hold_signals(peers)
    with start.one_voice(peers):
        if as_json:
            result.check_alone(peers)
        if teacher is not None:
            overrides = (*overrides, _taught_by(teacher, runs_folder))
        # Of several ranks one says what is to be said of the recipe.
        loaded = load_recipe(recipe, overrides, notice if start.should_report(peers) else None)
        cpus = cpus_per_task(os.environ)
        launch = Launch(launcher, 1, nnodes, rdzv_endpoint, node_rank, hostfile, cpus)
        several = launch.most_nodes > 1 and launcher in ("torchrun", "accelerate")
        if several and run is None and run_dir is None:
            raise UserError(f"--nnodes {nnodes} needs --run NAME, the same on each machine")
        count = start.ranks_here(loaded, peers, nproc, launch.most_nodes, os.environ)
        options.check_at_once(members is not None or loaded.phases is not None, at_once)
        if loaded.phases is not None:
            check_starts_here(members, peers, several or launcher != "torchrun")
        if members is not None:
            if peers is not None or several or launcher != "torchrun":
                raise UserError(
                    "--members starts its runs itself, on this machine; leave out other launchers "
                    "and --nnodes, or train them on SLURM with `bigbatch submit --array`"
                )
            start.check_start(loaded)
            loaded = with_measured(loaded)
            path = run_dir or runs_folder / (run or loaded.name)
            status = run_members(loaded, path, members, count or 1, at_once or 1)
            if as_json:
                runs = [result.standing(each, status) for each in member_paths(path, members)]
                options.print_json({"runs": runs, "exit_status": status})
            sys.exit(status)
        path = start.run_path(loaded, run, run_dir, peers, runs_folder)
        if not RunDir(path).summary.exists():  # a finished run needs its shards no more
            start.check_start(loaded, peers)
        if loaded.phases is not None:
            check_new(path, loaded)
            made = registry.new_run(path, loaded, made_up=run is None and run_dir is None)
            _end_with(made, train_phases(made, count or 1, at_once or 1), as_json)
        if peers is None and not several:
            path = registry.new_run(path, loaded, made_up=run is None and run_dir is None).path
        else:
            joined = start.join_run(path, loaded)
            if as_json and joined.summary.exists():
                options.print_json(result.standing(path))
                return
            if start.is_finished(joined, peers):  # launchers repeat their command
                return
        if as_json:
            result.report_run(path)
        start.begin(path, peers, None if count is None else replace(launch, nproc=count))


def _end_with(run: "RunDir", status: int, as_json: bool) -> NoReturn:
    from bigbatch.configs.terminal import Terminal
    from bigbatch.launcher.cli import result
    from bigbatch.trainers.report.results import final_table

    if as_json:
        options.print_json(result.standing(run.path, status))
    elif status == 0:
        Terminal(soft_wrap=True).print(final_table(json.loads(run.summary.read_bytes())))
        options.say(f"report   {run.report}")
    sys.exit(status)


def _taught_by(teacher: str, runs: Path) -> str:
    """The change to a recipe that names a folder of an ensemble, or a run by name or directory."""
    from bigbatch.launcher.runs.registry import find_model

    return f"distill.teacher={json.dumps(str(find_model(teacher, runs)))}"


@click.command(short_help="Go on with a run from its newest checkpoint.")
@click.argument("run")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--nproc", type=click.IntRange(1), help="Processes here; default: one per GPU.")
@click.option("--at-once", type=click.IntRange(1), help="Workers of phases side by side.")
@click.option("--slurm", is_flag=True, help="Submit the run's own batch script again.")
@click.option(
    "--sbatch-arg", multiple=True, help="With --slurm: an option of sbatch; may be repeated."
)
@options.runs_folder
@options.as_json
def resume(
    run: str,
    overrides: tuple[str, ...],
    nproc: int | None,
    at_once: int | None,
    slurm: bool,
    sbatch_arg: tuple[str, ...],
    runs_folder: Path,
    as_json: bool,
) -> None:
    """Go on with RUN, a name or a directory, with any number of processes.

    The batches are the same whatever that number is; weights differ by the order of
    floating-point sums alone, and not at all at the number that the run had before.
    KEY=VALUE changes keys that do not decide what is computed, such as backend=zero1.
    """
    from bigbatch.configs.errors import UserError
    from bigbatch.launcher import start
    from bigbatch.launcher.cli import result
    from bigbatch.launcher.env import find_peers
    from bigbatch.launcher.launchers import Launch
    from bigbatch.launcher.phases import check_starts_here, train_phases
    from bigbatch.launcher.runs.registry import find_run
    from bigbatch.launcher.slurm.submit import resubmit, see_that_no_job_lives

    peers = find_peers(os.environ)
    start.hold_signals(peers)
    with start.one_voice(peers):
        if as_json:
            result.check_alone(peers)
        if sbatch_arg and not slurm:
            raise UserError("--sbatch-arg needs --slurm, which submits the run again")
        found = find_run(run, runs_folder)
        recipe = start.changed_recipe(found, overrides, peers) if overrides else found.recipe()
        options.check_at_once(recipe.phases is not None, at_once)
        if as_json and found.summary.exists():
            options.print_json(result.standing(found.path))
            return
        if start.is_finished(found, peers):
            return
        if peers is None:
            see_that_no_job_lives(found)
        start.check_start(recipe, peers)
        if slurm:
            with start.stored(found, recipe, peers):
                job = resubmit(found, sbatch_arg)
            if as_json:
                options.print_json({"job": job, "run": str(found.path)})
            else:
                options.say(job)
            return
        count = start.ranks_here(recipe, peers, nproc, 1, os.environ)
        with start.stored(found, recipe, peers):
            if recipe.phases is not None:
                check_starts_here(None, peers)
                _end_with(found, train_phases(found, count or 1, at_once or 1), as_json)
            if as_json:
                result.report_run(found.path)
            start.begin(found.path, peers, None if count is None else Launch(nproc=count))


@click.command(short_help="Prove that batches and weights depend on the recipe alone.")
@options.recipe
@click.option("--steps", type=int, default=10, show_default=True, help="Steps of each run.")
@click.option("--ranks", help="World sizes to compare.  [default: 1,2,3,4, as far as possible]")
@click.option("--seed", type=int, default=0, show_default=True, help="Chooses the step to kill at.")
@click.option("--keep", type=click.Path(path_type=Path), help="Keep the runs in this new folder.")
@options.as_json
def prove(
    recipe: str,
    overrides: tuple[str, ...],
    steps: int,
    ranks: str | None,
    seed: int,
    keep: Path | None,
    as_json: bool,
) -> None:
    """Run the first steps of RECIPE with 1, 2, 3 and 4 processes, and killed and resumed.

    Proven: every step reads the same samples, weights agree within 1e-5 across numbers of
    processes, and bit for bit after kill -9 and resume. Exit status 0 proven, 1 not.
    """
    import tempfile

    from bigbatch.configs.errors import UserError
    from bigbatch.configs.load import load_recipe
    from bigbatch.data.measured import with_measured
    from bigbatch.launcher import prove as proof
    from bigbatch.launcher.start import check_start
    from bigbatch.trainers.planning.plan import fits

    loaded = load_recipe(recipe, overrides)
    counts = [n for n in (1, 2, 3, 4) if fits(loaded, n)]
    if ranks is not None:
        try:
            counts = [int(n) for n in ranks.split(",")]
        except ValueError:
            raise UserError(f"--ranks {ranks!r} is not a list such as 1,2,4") from None
    check_start(loaded)
    loaded = with_measured(loaded)
    if keep is not None and keep.exists():
        raise UserError(f"--keep {keep} exists already; name a new folder")
    with tempfile.TemporaryDirectory(prefix="bigbatch-prove-") as temporary:
        try:
            results = proof.prove(
                loaded,
                keep or Path(temporary),
                steps=steps,
                ranks=counts,
                seed=seed,
                say=lambda text: options.say(text, err=True),
            )
        except proof.RunFailed as error:
            options.say(f"bigbatch: {error}", err=True)
            sys.exit(1)
    if as_json:
        options.say(proof.as_json(results, steps))
    else:
        from bigbatch.launcher.cli.render import proof_table, show

        show(proof_table(results, loaded.name, steps))
    sys.exit(0 if all(r.passed for r in results) else 1)


@click.command(short_help="Follow a run in the terminal.")
@click.argument("run")
@options.runs_folder
def watch(run: str, runs_folder: Path) -> None:
    """Follow RUN, a name or a directory, with plots, until it ends or Ctrl-C."""
    from bigbatch.launcher.runs.registry import ENDED, find_run, state_of
    from bigbatch.trainers.report.watch import watch

    found = find_run(run, runs_folder)

    def ended() -> str | None:
        state = state_of(found)
        return state if state in ENDED else None

    watch(found, ended=ended)


@click.command(short_help="What a run's curves say, and which key to turn.")
@click.argument("run")
@options.runs_folder
@options.as_json
def diagnose(run: str, runs_folder: Path, as_json: bool) -> None:
    """Say what the records of RUN, finished or not, show: problems first, each with its figures."""
    from bigbatch.launcher.runs.registry import find_run
    from bigbatch.trainers.report.diagnosis import diagnose_run

    findings = diagnose_run(find_run(run, runs_folder))
    if as_json:
        options.print_json([finding.as_dict() for finding in findings])
    else:
        from bigbatch.configs.terminal import Terminal
        from bigbatch.trainers.report.findings import say_findings

        say_findings(findings, Terminal(soft_wrap=True))


@click.command(short_help="Write a run's report.html.")
@click.argument("run")
@options.runs_folder
@options.as_json
def report(run: str, runs_folder: Path, as_json: bool) -> None:
    """Write report.html of RUN, finished or not: one self-contained page."""
    from bigbatch.launcher.runs.registry import find_run
    from bigbatch.trainers.report.report import write_report

    path = write_report(find_run(run, runs_folder))
    if as_json:
        options.print_json({"report": str(path)})
    else:
        options.say(path)
