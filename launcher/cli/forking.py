"""The commands that branch runs off a checkpoint of another one."""

import os
import sys
from pathlib import Path

import click

from bigbatch.launcher.cli import options


@click.command(short_help="Branch a new run off a checkpoint of another one.")
@click.argument("parent", metavar="RUN[@STEP]")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--step", type=click.IntRange(0), help="Branch off here; default: the newest.")
@click.option(
    "--members",
    type=click.IntRange(2),
    help="Branch off so many runs NAME-0, NAME-1, ... by seed.",
)
@click.option("--at-once", type=click.IntRange(1), help="With --members: so many side by side.")
@click.option("--nproc", type=click.IntRange(1), help="Processes here; default: one per GPU.")
@click.option("--no-train", is_flag=True, help="Make the runs, and leave them to `resume`.")
@options.new_run
@options.runs_folder
@options.as_json
def fork(
    parent: str,
    overrides: tuple[str, ...],
    step: int | None,
    members: int | None,
    at_once: int | None,
    nproc: int | None,
    no_train: bool,
    run: str | None,
    run_dir: Path | None,
    runs_folder: Path,
    as_json: bool,
) -> None:
    """Train a new run that goes on from a checkpoint of RUN, with KEY=VALUE changes to its recipe.

    \b
    bigbatch fork digits --step 60 optimizer.lr=1     what if the rate were lower from here on
    bigbatch fork digits@60 --members 3               three ends of one trunk, by seed

    Unchanged it becomes, bit for bit, what RUN becomes. The place is kept in samples, so
    another global_batch goes on at the same image. Without --run it is called RUN-fork.
    """
    from bigbatch.configs.errors import UserError
    from bigbatch.configs.load import change_recipe
    from bigbatch.configs.notices import notice
    from bigbatch.data.measured import with_measured
    from bigbatch.launcher import fork as branching
    from bigbatch.launcher import start
    from bigbatch.launcher.cli import result
    from bigbatch.launcher.env import find_peers
    from bigbatch.launcher.launchers import Launch
    from bigbatch.launcher.members import member_paths, member_recipes, train_members
    from bigbatch.launcher.runs.registry import find_run
    from bigbatch.trainers.planning.environment import check_environment

    if find_peers(os.environ) is not None:
        raise UserError(
            "fork makes runs, and starts them itself: call it outside of a launcher, with "
            "--no-train, and start them there by `bigbatch resume`"
        )
    options.check_at_once(members is not None, at_once)
    name, at, number = parent.rpartition("@")
    if at:
        if not number.isascii() or not number.isdigit():
            raise UserError(f"{parent}: after @ comes the step, a whole number, as in {name}@60")
        if step is not None:
            raise UserError(f"{parent} names a step, and --step {step} as well; give one of them")
        parent, step = name, int(number)
    trunk = find_run(parent, runs_folder)
    checkpoint = branching.find_checkpoint(trunk, step)
    # A branch is a run by itself, also where its parent is a trunk with workers of its own.
    recipe = with_measured(change_recipe(trunk.recipe(), ("phases=null", *overrides), notice))
    if recipe.phases is not None:
        raise UserError(
            "phases follow a run that `bigbatch train` starts, not a branch; leave them out, and "
            "branch off the branch's end once it is trained"
        )
    nproc = start.ranks_here(recipe, None, nproc, 1, os.environ)
    path = run_dir or runs_folder / (run or f"{trunk.name}-fork")
    if members is None:
        if run_dir is None and run is None:
            path = start.unused_path(path)
        paths, recipes = [path], [recipe]
    else:
        paths, recipes = member_paths(path, members), member_recipes(recipe, members)
    check_environment(os.environ)
    branches = [
        branching.plan_branch(trunk, checkpoint, p, r) for p, r in zip(paths, recipes, strict=True)
    ]
    made = branching.make_branches(trunk, checkpoint, branches)
    for note in branches[0].notes:
        notice(note)
    for branch in made:
        options.say(f"{branch.path} goes on after step {branches[0].step}", err=True)
    if members is None and not no_train and not made[0].summary.exists():
        if as_json:
            result.report_run(made[0].path)
        start.begin(made[0].path, None, Launch(nproc=nproc or 1))
        return
    status = 0
    if members is not None and not no_train:
        status = train_members(made, nproc or 1, at_once or 1)
    if as_json:
        found = [result.standing(branch.path, status) for branch in made]
        several = {"runs": found, "exit_status": status}
        options.print_json(found[0] if members is None else several)
    elif members is None and not no_train:
        start.is_finished(made[0], None)
    sys.exit(status)


@click.command(short_help="What a change would have done from a step on: twins, compared.")
@click.argument("run")
@click.option("--step", type=click.IntRange(0), required=True, help="From here, or just before.")
@click.option(
    "--set",
    "sets",
    multiple=True,
    required=True,
    metavar="KEY=VALUE,VALUE",
    help="What twins differ by; 0.5x is that times the recipe's own.",
)
@click.option("--steps", type=click.IntRange(1), required=True, help="That each twin makes.")
@click.option("--nproc", type=click.IntRange(1), help="Processes of a twin; default: one per GPU.")
@click.option(
    "--keep", type=click.Path(path_type=Path), help="New folder for the twins; default: none stay."
)
@options.runs_folder
@options.as_json
def whatif(
    run: str,
    step: int,
    sets: tuple[str, ...],
    steps: int,
    nproc: int | None,
    keep: Path | None,
    runs_folder: Path,
    as_json: bool,
) -> None:
    """Train twins of RUN from a checkpoint at or before a step, and say which one is better.

    \b
    bigbatch whatif digits --step 60 --set optimizer.lr=0.5x,2x --steps 200

    All begin at one state and see the same samples, views and masks; one is unchanged. They are
    evaluated on the validation split and compared image by image, with intervals. RUN is only read.
    """
    import tempfile
    from contextlib import nullcontext

    from bigbatch.configs.errors import UserError
    from bigbatch.launcher import start
    from bigbatch.launcher import whatif as twins
    from bigbatch.launcher.child import RunFailed
    from bigbatch.launcher.env import find_peers
    from bigbatch.launcher.runs.registry import find_run
    from bigbatch.trainers.planning.environment import check_environment

    if find_peers(os.environ) is not None:
        raise UserError("whatif starts its twins itself: call it outside of a launcher")
    check_environment(os.environ)
    found = find_run(run, runs_folder)
    if keep is not None:
        try:
            keep.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"--keep {keep}: {error.strerror}; choose a new folder") from None
    nproc = start.ranks_here(found.recipe(), None, nproc, 1, os.environ) or 1

    def say(text: str) -> None:
        options.say(f"bigbatch: {text}", err=True)

    said: dict[str, int] = {}

    def progress(twin: twins.Twin, step: int) -> None:
        if twin.name not in said:
            said[twin.name] = step
            say(f"{twin.name} ...")

    place = tempfile.TemporaryDirectory(prefix="bigbatch-whatif-") if keep is None else None
    with place or nullcontext(str(keep)) as folder:
        try:
            result = twins.whatif(
                found, step, sets, steps, Path(folder), nproc=nproc, say=say, progress=progress
            )
        except RunFailed as error:
            raise UserError(str(error)) from None
    if as_json:
        options.print_json(result)
        return
    for line in twins.in_words(result):
        options.say(line)
    options.say(
        f"over {result['samples']:,} images of {result['split']}; intervals hold for all pairs "
        "together with 95 %, and are of these images, not of other seeds"
    )
