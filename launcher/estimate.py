"""What a run will need of memory, disk, time to save and network, before it starts.

Free of torch: what needs it runs as a process, and is skipped, with the reason, without it.
"""

import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bigbatch.configs.batch import PostLocal
from bigbatch.configs.errors import UserError
from bigbatch.configs.rundir import ROW_BYTES
from bigbatch.configs.schema import Recipe
from bigbatch.configs.size import height_width
from bigbatch.configs.words import plural
from bigbatch.trainers.planning.plan import Plan

_PROBE_BYTES = 32 << 20
_PATIENCE_S = 120.0
_NETWORK_PATIENCE_S = 2.0
_MARGIN = 1.2  # on disk space: reports, metrics, wandb


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `state`: ok, warning, or skipped."""

    name: str
    state: str
    text: str


def model_size(recipe: Recipe, classes: int, epoch_samples: int = 1) -> dict[str, Any] | str:
    """Sizes as trainers/models/size.py finds them, or why they are not known here."""
    return ask("size", str(classes), str(epoch_samples), given=recipe.model_dump_json())


def ask(
    module: str, *arguments: str, given: str = "", patience_s: float = _PATIENCE_S
) -> dict[str, Any] | str:
    """What a module of trainers/models, started as a process, prints; or why there is no answer.

    Raises UserError where the module refuses what it was given: a run would be refused alike.
    """
    if find_spec("torch") is None:
        return "no torch on this machine"
    command = [sys.executable, "-P", "-m", f"bigbatch.trainers.models.{module}", *arguments]
    # No GPU is touched, and no server asked for weights.
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            command,
            input=given,
            env=env,
            capture_output=True,
            text=True,
            check=False,
            timeout=patience_s,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {patience_s:.0f} s"
    if done.returncode == 2:
        raise UserError(done.stderr.strip())
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        lines = done.stderr.strip().splitlines()
        return lines[-1] if lines else f"no answer, and status {done.returncode}"
    return answer


def memory(recipe: Recipe, size: dict[str, int]) -> dict[str, int]:
    """Bytes of one rank while it trains, by what they are for.

    `exact` keeps a float64 sum of the gradients; images are float32, before and after the
    warp. Workspaces of kernels and the allocator's own losses come on top.
    """
    data, micro = recipe.data, recipe.micro_batch * recipe.views
    image = 4 * data.channels * math.prod(height_width(data.image_size))
    parts = {
        "weights": size["weight_bytes"],
        "gradients": size["gradient_bytes"],
        "optimizer": size["optimizer_bytes"],
        "exact sums": 8 * size["parameters"] if recipe.reduction == "exact" else 0,
        "average": average_bytes(recipe, size),
        "a worker": worker_bytes(recipe, size),
        "activations": micro * size["activation_bytes"],
        "images": 2 * micro * image,
    }
    return {name: count for name, count in parts.items() if count}


def disk_bytes(recipe: Recipe, plan: Plan, size: dict[str, int]) -> int:
    """What the run directory will hold: checkpoints, one more while it is written, snapshots, and
    rows of samples; those of workers behind the run as much each."""
    checkpoint = checkpoint_bytes(recipe, size)
    snapshots = len(plan.snapshots) + recipe.ensemble.soup + (recipe.average is not None)
    rule = recipe.checkpoint
    count = rule.keep + rule.keep_best + 1 + plan.kept()
    kept = count * checkpoint + snapshots * size["weight_bytes"]
    kept += ROW_BYTES * plan.timeline.first(plan.total) if recipe.log.samples else 0
    runs = 1 if recipe.phases is None else 1 + recipe.phases.workers
    return round(_MARGIN * kept * runs)


def checkpoint_bytes(recipe: Recipe, size: dict[str, int]) -> int:
    return size["weight_bytes"] + size["optimizer_bytes"] + average_bytes(recipe, size)


def average_bytes(recipe: Recipe, size: dict[str, int]) -> int:
    """Of the average of the weights, in float64."""
    return 8 * size["parameters"] if recipe.average is not None else 0


def worker_bytes(recipe: Recipe, size: dict[str, int]) -> int:
    """Of a worker that trains apart: weights, optimizer state and sums of its own; a rank may have
    several."""
    if not isinstance(recipe.global_batch, PostLocal):
        return 0
    return size["weight_bytes"] + size["optimizer_bytes"] + 8 * size["parameters"]


def scores_memory(sizes: Sequence[int], classes: int, snapshots: int, batch: int) -> Finding:
    """What rank 0 holds at the end, of splits of `sizes` samples, evaluated `batch` at a time.

    By snapshot, and of their ensemble: outcomes (six float64 a sample, copied while they are put
    in order), sums of calibration (15 bins a class, twice, and once more to add up ranks), and
    the logits of a batch. The weights of all snapshots come on top.
    """
    models = snapshots + 2
    need = models * (3 * 48 * sum(sizes) + 3 * 240 * classes) + 2 * 4 * models * batch * classes
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    counts = ((sum(sizes), "sample"), (classes, "class"), (snapshots, "snapshot"))
    what = ", ".join(plural(count, noun) for count, noun in counts)
    text = f"about {_gb(need)} on rank 0 for the scores of {what}"
    if need <= there:
        return Finding("results", "ok", text)
    return Finding(
        "results",
        "warning",
        f"{text}, and this machine has {_gb(there)}: the run would end without results; evaluate "
        "fewer samples (data.val, data.test) or fewer at a time (evaluate.batch), or keep fewer "
        "snapshots",
    )


def write_speed(folder: Path) -> float:
    """Bytes per second at which a file reaches the disk under `folder`. Raises OSError."""
    folder = _existing(folder)
    probe = folder / f".bigbatch-probe-{os.getpid()}"
    block = os.urandom(_PROBE_BYTES)  # zeros might be compressed away
    try:
        started = time.perf_counter()
        with probe.open("wb") as file:
            file.write(block)
            file.flush()
            os.fsync(file.fileno())
        return _PROBE_BYTES / (time.perf_counter() - started)
    finally:
        probe.unlink(missing_ok=True)


def signal_lead(save_s: float) -> int:
    """Seconds between SLURM's signal and the end: a slow step and evaluation, and two savings.

    SLURM may signal up to a minute late (sbatch(1), --signal), so never below two minutes.
    """
    return max(120, 60 * -(-round(60 + 2 * save_s) // 60))


@dataclass(frozen=True)
class Estimate:
    """What was found, and the signal lead that follows: None where saving was not measured.

    `layers` are how the fresh network passes variance on, as trainers/models/signal.py says,
    `rates` what learns at which rate (`rate_table` of trainers/optim/stages.py).
    """

    findings: list[Finding]
    lead: int | None
    layers: tuple[dict[str, Any], ...] = ()
    rates: tuple[dict[str, Any], ...] = ()


def look(
    recipe: Recipe, plan: Plan, epoch_samples: int, classes: int, folder: Path, lead: int | None
) -> Estimate:
    """Memory, disk and saving time for a run below `folder`, and whether wandb answers."""
    wandb = _wandb(recipe)
    size = model_size(recipe, classes, epoch_samples)
    if isinstance(size, str):
        return Estimate([Finding("memory, disk, saving", "skipped", size), wandb], None)
    parts = memory(recipe, size)
    each = ", ".join(f"{name} {_gb(count)}" for name, count in parts.items())
    text = f"{size['parameters']:,} parameters; about {_gb(sum(parts.values()))} a rank: {each}"
    found = [Finding("memory", "ok", text)]
    first = size["signal"]
    layers, rates = tuple(first["layers"]), tuple(size["rates"])
    found.append(Finding("first step", first["state"], first["text"]))
    need = disk_bytes(recipe, plan, size)
    try:
        free = shutil.disk_usage(_existing(folder)).free
        save_s = checkpoint_bytes(recipe, size) / write_speed(folder)
    except OSError as error:
        unwritable = Finding("disk", "warning", f"{folder} cannot be written: {error}")
        return Estimate([*found, unwritable, wandb], None, layers, rates)
    text = f"{_gb(need)} needed under {folder}, {_gb(free)} free"
    if need > free:
        found.append(Finding("disk", "warning", f"{text}; free some, or lower checkpoint.keep"))
    else:
        found.append(Finding("disk", "ok", text))
    wanted = signal_lead(save_s)
    text = f"about {save_s:.1f} s for a checkpoint of {_gb(checkpoint_bytes(recipe, size))}"
    if lead is not None and lead < wanted:
        text += f"; the signal comes only {lead} s before the end: use --signal-lead {wanted}"
        found.append(Finding("saving", "warning", text))
    else:
        text += f"; SLURM signals {lead or wanted} s before the time limit"
        found.append(Finding("saving", "ok", text))
    return Estimate([*found, wandb], lead or wanted, layers, rates)


def _wandb(recipe: Recipe) -> Finding:
    from bigbatch.trainers.monitoring.wandb_view import logged_in

    switch = os.environ.get("WANDB_MODE", "")
    if recipe.log.wandb == "off" or switch == "disabled":
        return Finding("wandb", "ok", "off")
    chosen = "offline" in (recipe.log.wandb, switch)
    if chosen or not logged_in():
        why = "" if chosen else ": nobody is logged in"
        return Finding("wandb", "ok", f"offline{why}; `bigbatch sync RUN` sends it later")
    url = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        socket.create_connection((url.hostname or "", port), _NETWORK_PATIENCE_S).close()
    except OSError as error:
        text = f"{url.netloc} does not answer from here ({error}); the run would go on offline"
        return Finding("wandb", "warning", text)
    return Finding("wandb", "ok", f"online, {url.netloc} answers")


def _existing(folder: Path) -> Path:
    """`folder`, or the nearest one above it that exists."""
    return next(p for p in (folder.absolute(), *folder.absolute().parents) if p.is_dir())


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
