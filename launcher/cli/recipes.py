"""Commands about recipes: nothing is started."""

import os
import sys
from pathlib import Path
from typing import Any

import click

from bigbatch.launcher.cli import options

_LISTED_STEPS = 10_000_000


@click.command(short_help="List the built-in recipes.")
@options.as_json
def recipes(as_json: bool) -> None:
    """List the built-in recipes; `bigbatch train NAME` takes one by its name."""
    from bigbatch.configs.load import builtin_recipes, find_recipe

    found = {name: _headline(find_recipe(name)) for name in builtin_recipes()}
    if as_json:
        options.print_json(found)
        return
    width = max(map(len, found))
    for name, headline in found.items():
        options.say(f"{name:{width}}  {headline}")


@click.command(short_help="List the models that a recipe can name.")
@click.argument("pattern", default="*")
@click.option(
    "--limit", type=click.IntRange(0), default=20, show_default=True, help="Measure so many."
)
@click.option("--classes", type=click.IntRange(1), default=1000, show_default=True)
@options.as_json
def models(pattern: str, limit: int, classes: int, as_json: bool) -> None:
    """List models by a PATTERN such as 'resnet*' or mobilenet: parameters, FLOPs, input size.

    \b
    bigbatch models 'convnext_*'
    bigbatch models 'torchvision:*' --limit 100

    FLOPs are those of a forward pass of one image at the model's usual size, a multiplication
    and its addition counted as two. Only the first --limit models are built and measured.
    """
    from bigbatch.configs.errors import UserError
    from bigbatch.launcher.estimate import ask

    found = ask("catalogue", pattern, str(limit), str(classes), patience_s=60 + 30 * limit)
    if isinstance(found, str):
        raise UserError(f"models cannot be listed: {found}; list them where torch and timm are")
    if not found["names"]:
        raise UserError(f"no model matches {pattern!r}; give another PATTERN, such as 'resnet*'")
    if as_json:
        options.print_json(found)
        return
    from rich.table import Table

    from bigbatch.launcher.cli.render import show

    if found["models"]:
        table = Table()
        for title in ("model.name", "parameters", "FLOPs", "input"):
            table.add_column(title, justify="left" if title == "model.name" else "right")
        for model in found["models"]:
            flops = f"{model['flops'] / 1e9:,.3g} G" if model["flops"] else "unknown"
            parameters = f"{model['parameters'] / 1e6:,.4g} M" if model["parameters"] else "unknown"
            size = " x ".join(map(str, model["input_size"] or ()))
            table.add_row(model["name"], parameters, flops, size)
        show(table)
    others = found["names"][len(found["models"]) :]
    for name in others:
        options.say(name)
    if others:
        options.say(
            f"{options.plural(len(found['names']), 'model')}, of which {len(found['models']):,} "
            "were measured: raise --limit, or narrow PATTERN",
            err=True,
        )


def _headline(path: Path) -> str:
    """The comment on the first line of a recipe."""
    with path.open(encoding="utf-8") as file:
        first = file.readline().strip()
    return first.lstrip("# ") if first.startswith("#") else ""


@click.command(short_help="Check a recipe and its data; start nothing.")
@options.recipe
@click.option("--nproc", type=click.IntRange(1), help="Also check that this many ranks can run.")
@click.option("--nodes", type=click.IntRange(1), default=1, help="On each of so many nodes.")
@click.option("--quick", is_flag=True, help="Leave out memory, disk, saving, wandb and sbatch.")
@options.runs_folder
@options.as_json
def check(
    recipe: str,
    overrides: tuple[str, ...],
    nproc: int | None,
    nodes: int,
    quick: bool,
    runs_folder: Path,
    as_json: bool,
) -> None:
    """Open everything that RECIPE names and say what a run of it will do, and need."""
    from dataclasses import asdict

    from bigbatch.configs.load import load_recipe
    from bigbatch.launcher import preflight
    from bigbatch.launcher.env import start_variables
    from bigbatch.launcher.phases import plan_workers
    from bigbatch.launcher.slurm.submit import try_job

    loaded = load_recipe(recipe, overrides)
    world = None if nproc is None and nodes == 1 else (nproc or 1) * nodes
    found = preflight.check(loaded, world)
    workers = plan_workers(loaded)
    found["phases"] = None if workers is None else workers.in_words()
    found["environment"] = start_variables(nproc or 1, nodes, None, os.environ)
    findings = []
    if not quick:
        estimate = preflight.estimate(loaded, runs_folder)
        found["layers"], found["rates"] = estimate.layers, estimate.rates
        findings = list(estimate.findings)
        findings.append(try_job(loaded, nodes, nproc or 1, runs_folder))
    if as_json:
        options.print_json({**found, "findings": [asdict(finding) for finding in findings]})
        return
    from bigbatch.launcher.cli.render import rates_table, show, two_columns

    marks = {"ok": "", "warning": "WARNING: ", "skipped": "skipped: "}
    needs = {finding.name: marks[finding.state] + finding.text for finding in findings}
    show(two_columns(_rows(found) | needs))
    if found.get("rates"):
        show(rates_table(found["rates"]))


def _rows(found: dict[str, Any]) -> dict[str, str]:
    from bigbatch.launcher import preflight

    splits = [
        f"{n} {s['samples']:,} in {options.plural(s['shards'], 'shard')}"
        for n, s in found["splits"].items()
    ]
    fewest, largest = found["smallest_class"], found["largest_class"]
    each = options.plural(largest, "sample")
    each = each if fewest == largest else f"{fewest:,} to {largest:,} samples"
    micro_batches = found["micro_batches"]
    most = found["most_ranks"]
    ranks = options.plural(1, "rank") if most == 1 else f"1 to {most:,} ranks"
    rates = [f"{rate:.4g} at {step}" for step, rate in found["lr"].items()]
    rows = {
        "recipe": f"{found['recipe']}, hash {found['hash']}",
        "samples": ", ".join(splits),
        "classes": f"{found['classes']:,}, with {each} in {found['counted']}",
        "labels": preflight.spark(sorted(found["labels"], reverse=True)),
        "step": f"{'at most ' * bool(found['batches'])}"
        f"{options.plural(found['global_batch'], 'sample')} in "
        f"{options.plural(micro_batches, 'micro-batch')} of {found['micro_batch']:,}: {ranks}",
        "length": f"{options.plural(found['steps'], 'step')}, "
        f"{options.plural(float(found['epochs']), 'epoch')} of "
        f"{options.plural(found['epoch_samples'], 'sample')}",
        "evaluations": f"{found['evaluations']:,}",
        "checkpoints": f"{found['checkpoints']:,}",
        "snapshots": "after step " + ", ".join(map(str, found["snapshots"])),
        "learning rate": ", ".join(rates),
        "over the run": preflight.spark(found["lr_curve"]),
        "chosen": ", ".join(f"{name}={value}" for name, value in found["environment"].items()),
    }
    if found["lr_depends_on_evaluations"]:
        rows["learning rate"] += "; lowered on plateaus, which only the run can find"
    if found["average"]:
        rows["average"] = found["average"]
    if found["phases"]:
        rows["phases"] = found["phases"]
    if found["notes"]:
        rows["note"] = "; ".join(found["notes"])
    if found["weights"]:
        rows["weights"] = "; ".join(found["weights"])
    if found["lr_rule"]:
        rows["batch rule"] = found["lr_rule"]
    return rows


@click.command(short_help="Show, or draw, a recipe's learning rate.")
@options.recipe
@click.option("--plot", type=click.Path(path_type=Path), help="Picture to write: .png, .svg, .pdf")
@click.option(
    "--epoch-samples", type=click.IntRange(1), help="Samples in an epoch, where shards are not."
)
@options.as_json
def schedule(
    recipe: str,
    overrides: tuple[str, ...],
    plot: Path | None,
    epoch_samples: int | None,
    as_json: bool,
) -> None:
    """Show the learning rate of RECIPE at its key steps; with --json at every step.

    Step s is the one after s finished steps, so the first is step 0.
    """
    from bigbatch.configs.errors import UserError
    from bigbatch.configs.load import load_recipe
    from bigbatch.configs.schedules import depends_on_evaluations
    from bigbatch.launcher import preflight
    from bigbatch.trainers.planning.inputs import open_inputs

    loaded = load_recipe(recipe, overrides)
    options.check_picture(plot)
    if depends_on_evaluations(loaded.schedule):
        raise UserError(
            "schedule plateau: its rate depends on what the run measures, so it cannot be drawn "
            "in advance; `bigbatch check` gives the rate without reductions, and a run records "
            "its rates in metrics.jsonl"
        )
    if epoch_samples is None:
        try:
            epoch_samples = open_inputs(loaded).epoch_samples
        except UserError as error:
            raise UserError(f"{error}; or say how long an epoch is by --epoch-samples N") from None
    plan, rate = preflight.fit_rate(loaded, epoch_samples)
    if plot is not None:
        options.write_picture(plot, lambda: preflight.draw(loaded.name, plan, rate, plot))
    rule = preflight.lr_rule(loaded)
    if as_json:
        if plan.total > _LISTED_STEPS:
            raise UserError(
                f"--json lists every step, and duration {loaded.duration} makes {plan.total:,}; "
                f"at most {_LISTED_STEPS:,} are listed: leave out --json, or shorten duration"
            )
        rates = [rate(s) for s in range(plan.total)]
        options.print_json({"steps": plan.total, "lr_rule": rule, "lr": rates})
        return
    if rule:
        options.say(rule)
    for step, value in preflight.key_rates(plan, rate).items():
        options.say(f"step {step:>8,}  {value:.6g}")
    if plot is not None:
        options.say(plot)


@click.command(short_help="Draw what a recipe's augmentation makes of images.")
@options.recipe
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Picture to write: .png"
)
@click.option("--images", type=click.IntRange(1, 64), default=8, show_default=True, help="A row.")
@click.option("--step", type=click.IntRange(0), default=0, show_default=True, help="Of training.")
@options.as_json
def augment(
    recipe: str, overrides: tuple[str, ...], out: Path, images: int, step: int, as_json: bool
) -> None:
    """Draw the first images of a step of RECIPE as the model will see them.

    A row for what evaluation sees, one for each operation alone, by the draws that it has in
    training, and one for all of them together.

    \b
    bigbatch augment cifar10-resnet18 --out grid.png
    bigbatch augment mine.yaml "augment.ops=[randaugment, erasing]" --out grid.png --step 100
    """
    from bigbatch.configs.load import load_recipe
    from bigbatch.data.measured import measured_keys
    from bigbatch.launcher.launchers import python

    loaded = load_recipe(recipe, overrides)  # before torch takes its seconds
    overrides = (*overrides, *measured_keys(loaded))
    command = [*python("bigbatch.trainers.inference.augmented"), "--out", str(out)]
    command += ["--images", str(images), "--step", str(step), *(["--json"] if as_json else [])]
    command += ["--", recipe, *overrides]
    sys.stdout.flush()
    os.execv(command[0], command)


@click.command(short_help="Write the JSON schema of recipes, for editors.")
@click.option("--output", type=click.Path(path_type=Path), help="File; default: the terminal.")
def schema(output: Path | None) -> None:
    """Write the JSON schema of recipes, so that an editor completes and checks them.

    \b
    bigbatch schema --output recipe.schema.json
    # then, as the first line of a recipe, for editors with the YAML language server:
    # yaml-language-server: $schema=recipe.schema.json
    """
    from bigbatch.configs.errors import UserError
    from bigbatch.configs.files import to_json, write_atomically
    from bigbatch.launcher.cli.editor import editor_schema

    text = to_json(editor_schema(), indent=1) + "\n"
    if output is None:
        options.say(text, nl=False)
        return
    try:
        write_atomically(output, text)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error}") from None
    options.say(output)
