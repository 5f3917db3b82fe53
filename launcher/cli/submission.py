"""The command that trains on SLURM."""

from dataclasses import replace
from pathlib import Path

import click

from bigbatch.launcher.cli import options


@click.command(short_help="Train on SLURM.")
@options.recipe
@click.option("--nodes", help="Nodes, or a range such as 2-8.  [default: 1]")
@click.option("--gpus-per-node", type=click.IntRange(0), help="GPUs of each node.  [default: 0]")
@click.option("--ranks-per-node", type=click.IntRange(1), help="Default: one per GPU, or one.")
@click.option(
    "--cpus-per-rank", type=click.IntRange(1), help="Default: for decoding threads and trainer."
)
@click.option("--time", help="Time limit, as SLURM writes it: 90, 12:00:00, 2-00:00:00.")
@click.option("--partition")
@click.option("--account")
@click.option("--qos")
@click.option("--constraint")
@click.option("--array", help="Runs RUN-0, RUN-1, ...: 0-4, or 0-9%2 for two at a time.")
@click.option(
    "--vary",
    multiple=True,
    metavar="KEY=VALUE,...",
    help="With --array: one value for each run. Default: seeds.  May be repeated.",
)
@click.option("--after", metavar="JOB", help="Start when this job, or run, has ended well.")
@click.option("--container", metavar="IMAGE", help="For apptainer (IMAGE.sif) or pyxis.")
@click.option(
    "--signal-lead",
    type=click.IntRange(1),
    help="Seconds to save in before the time limit.  [default: estimated, at least 120]",
)
@click.option("--sbatch-arg", multiple=True, help="Any other option of sbatch; may be repeated.")
@click.option("--no-check", is_flag=True, help="Submit without looking at memory, disk, wandb.")
@click.option("--dry-run", is_flag=True, help="Check, print the batch script; submit nothing.")
@options.new_run
@options.runs_folder
@options.as_json
def submit(
    recipe: str,
    overrides: tuple[str, ...],
    nodes: str | None,
    gpus_per_node: int | None,
    ranks_per_node: int | None,
    cpus_per_rank: int | None,
    time: str | None,
    partition: str | None,
    account: str | None,
    qos: str | None,
    constraint: str | None,
    array: str | None,
    vary: tuple[str, ...],
    after: str | None,
    container: str | None,
    signal_lead: int | None,
    sbatch_arg: tuple[str, ...],
    no_check: bool,
    dry_run: bool,
    run: str | None,
    run_dir: Path | None,
    runs_folder: Path,
    as_json: bool,
) -> None:
    """Create a run of RECIPE and submit it; prints the job id.

    The job is requeued when it is preempted or its time ends, and goes on from where it was,
    on the code and the recipe of this moment. Options that are left out come from
    ~/.config/bigbatch/slurm.yaml.

    \b
    bigbatch submit imagenet.yaml --nodes 4 --gpus-per-node 8 --time 12:00:00
    bigbatch submit imagenet.yaml --nodes 2-8 --gpus-per-node 8 --array 0-4
    """
    from bigbatch.configs.errors import UserError
    from bigbatch.configs.load import load_recipe
    from bigbatch.data.measured import with_measured
    from bigbatch.launcher import preflight, start
    from bigbatch.launcher.runs.registry import job_number
    from bigbatch.launcher.slurm import script
    from bigbatch.launcher.slurm import submit as submission
    from bigbatch.launcher.slurm.site_options import read_site, site_file
    from bigbatch.trainers.planning.plan import check_world

    loaded = load_recipe(recipe, overrides)
    if loaded.phases is not None:
        raise UserError(
            "phases: a job of `submit` is one run, and here that would be the trunk alone; train "
            "all of it inside an allocation of one machine, `salloc` or a job script of yours with "
            "`bigbatch train`, or submit the trunk with phases=null and branch its workers off by "
            "`bigbatch fork`"
        )
    site = read_site(site_file())
    job = submission.make_job(
        loaded,
        site,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        ranks_per_node=ranks_per_node,
        cpus_per_rank=cpus_per_rank,
        time=time,
        partition=partition,
        account=account,
        qos=qos,
        constraint=constraint,
        array=array,
        after=job_number(after, runs_folder) if after else None,
        container=container,
        signal_lead=signal_lead,
        options=sbatch_arg,
    )
    recipes = submission.array_recipes(loaded, job, vary)
    path = start.run_path(loaded, run, run_dir, None, runs_folder).absolute()
    paths = script.run_paths(job, path)
    mounts = [Path(mount) for mount in site.mounts]
    submission.script_of(job, path, loaded, mounts)  # refuses what no script can hold
    bare = dry_run and no_check
    # Runs that differ by their seed alone need one look at their shards.
    for own, each in zip(recipes, paths, strict=True) if vary else [(recipes[0], path)]:
        try:
            check_world(own, job.most_ranks)
            if not bare:
                start.check_start(own)
        except UserError as error:
            raise UserError(f"{each.name}: {error}" if vary else str(error)) from None
    if not no_check:
        found = preflight.estimate(loaded, path.parent, signal_lead or site.signal_lead)
        for finding in found.findings:
            if finding.state != "ok":
                options.say(f"{finding.state}: {finding.name}: {finding.text}", err=True)
        job = replace(job, lead=found.lead or job.lead)
    made = {"run": str(paths[0]), "runs": [str(each) for each in paths]}
    if dry_run:
        text = submission.script_of(job, path, loaded, mounts)
        if site_file().exists():
            options.say(f"defaults from {site_file()}", err=True)
        if as_json:
            options.print_json({"job": None, "script": text, **made})
        else:
            options.say(text, nl=False)
        return
    recipes = [with_measured(each) for each in recipes]
    number = submission.submit(recipes, job, path, mounts)
    if as_json:
        options.print_json({"job": number, **made})
    else:
        options.say(number)
        for each in paths:
            options.say(f"run {each}; `bigbatch status {each}` follows it", err=True)
