"""`bigbatch compress`: make every variant, and measure all of them side by side."""

import os
import platform
import shutil
from collections.abc import Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import sync, to_json, write_atomically
from bigbatch.configs.notices import notice
from bigbatch.configs.size import height_width
from bigbatch.data.index import Index
from bigbatch.trainers.compress import measure
from bigbatch.trainers.compress.candidates import (
    Settings,
    check_variant,
    settings_of,
    write_network,
    write_onnx,
)
from bigbatch.trainers.compress.finetune import check_finetuning
from bigbatch.trainers.compress.onnx_parts import open_session, operations, outcomes_by
from bigbatch.trainers.compress.picture import draw
from bigbatch.trainers.compress.samples import training_images
from bigbatch.trainers.compress.variants import FINE_TUNED, SCORED, Variant
from bigbatch.trainers.engine import Engine
from bigbatch.trainers.ensemble.members import Member
from bigbatch.trainers.evaluation.evaluate import labels_of
from bigbatch.trainers.evaluation.outcomes import Outcomes, join, outcomes_of
from bigbatch.trainers.export.served import INPUT
from bigbatch.trainers.inference.forward import Forward
from bigbatch.trainers.planning.inputs import Inputs, open_inputs

RESULT, PICTURE = "compression.json", "pareto.png"
BATCHES = (1, 64)  # images, whose latency is measured
_NEEDED = {
    "structured": ("torch_pruning",),
    "int8": ("onnx", "onnxscript", "onnxruntime"),
}
_PACKAGES = ("bigbatch", "torch", "torch-pruning", "onnxruntime")
_FLOAT32 = "float32"

Row = dict[str, Any]


def check_packages(variants: Sequence[Variant]) -> None:
    """Raise UserError where a method needs what is not installed."""
    for variant in variants:
        missing = [n for n in _NEEDED.get(variant.method, ()) if find_spec(n) is None]
        if missing:
            raise UserError(
                f"--method {variant.method} needs {' and '.join(missing)}, which is not "
                "installed; pip install 'bigbatch[compress]'"
            )


def sweep(
    engine: Engine,
    member: Member,
    variants: Sequence[Variant],
    settings: Settings,
    folder: Path,
) -> dict[str, Any]:
    """Write every variant into a new folder, its figures beside, all or nothing.

        FOLDER/compression.json, pareto.png
        FOLDER/prune-0.5/...    an ensemble of one, for `bigbatch evaluate`, `predict`, `export`
        FOLDER/int8/model.onnx

    Returns what compression.json holds. Raises UserError, and OSError for what a disk refuses.
    """
    if folder.exists():
        raise UserError(f"{folder} exists already; choose another --out")
    check_packages(variants)
    for variant in variants:
        check_variant(member, variant)
    if settings.finetune is not None:
        check_finetuning(member.recipe)
        if member.recipe.distill is not None:
            notice("--finetune goes by the labels alone; the recipe's teacher takes no part")
    inputs = open_inputs(member.recipe)
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        result = _sweep(engine, member, variants, settings, inputs, temporary)
        write_atomically(temporary / RESULT, to_json(result, indent=1) + "\n")
        draw(result, temporary / PICTURE)
        sync(temporary)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(folder.absolute().parent)
    return result


def _sweep(
    engine: Engine,
    member: Member,
    variants: Sequence[Variant],
    settings: Settings,
    inputs: Inputs,
    folder: Path,
) -> dict[str, Any]:
    images = []
    scored = settings.taylor and any(v.method in SCORED for v in variants)
    if scored or any(v.method == "int8" for v in variants):
        if "train" not in inputs.splits:
            raise UserError(
                "data.stream has no training split with an index, by which weights are scored and "
                "int8 is calibrated; use --method lowrank or codebook"
            )
        images = training_images(member, inputs.splits["train"], settings.images)
    rows: list[Row] = [{"name": _FLOAT32, "method": None, "runtime": "torch", "folder": None}]
    members = [member]
    for variant in variants:
        if variant.method == "int8":
            continue
        notice(f"{member.name}: {variant.name}")
        place = folder / variant.name
        members.append(write_network(place, member, variant, images, inputs, settings))
        rows.append(_row(variant, settings, "torch"))
    torch_rows = list(rows)
    onnx_rows: list[Row] = []
    files: list[Path] = []
    for variant in variants:
        if variant.method != "int8":
            continue
        notice(f"{member.name}: {variant.name}")
        files = [folder / "float32.onnx", folder / variant.name / "model.onnx"]
        write_onnx(files[0], files[1], member, images, settings)
        plain = {**rows[0], "name": f"{_FLOAT32} in ONNX", "runtime": "onnxruntime"}
        onnx_rows = [plain, _row(variant, settings, "onnxruntime")]
    rows += onnx_rows

    splits = {role: index for role, index in inputs.splits.items() if role != "train"}
    _measure_networks(engine, members, torch_rows, splits)
    _measure_files(files, onnx_rows, member, splits, torch_rows[0])
    _score(rows)
    _time(engine, members, files, rows, settings.rounds)
    for path in files[:1]:
        path.unlink()
    return {
        "member": member.name,
        "settings": settings_of(settings),
        "splits": {
            role: {"place": index.place, "samples": len(index), "data_hash": index.hash}
            for role, index in splits.items()
        },
        "machine": {**_machine(engine), "precision": member.recipe.precision},
        "results": rows,
    }


def _row(variant: Variant, settings: Settings, runtime: str) -> Row:
    how = {k: v for k, v in vars(variant).items() if k != "method" and v is not None}
    return {
        "name": variant.name,
        "method": variant.method,
        **how,
        "fine_tuned": settings.finetune is not None and variant.method in FINE_TUNED,
        "runtime": runtime,
        "folder": variant.name,
    }


def _measure_networks(
    engine: Engine, members: Sequence[Member], rows: list[Row], splits: dict[str, Index]
) -> None:
    recipe = members[0].recipe
    for member, row in zip(members, rows, strict=True):
        row |= measure.sizes(member.weights)
        row |= measure.counts(member.build(), recipe.data.channels, recipe.eval_size)
    forward = Forward(engine, members)
    for role, index in splits.items():
        parts: list[list[Outcomes]] = [[] for _ in rows]
        for outputs in forward.outputs(index):
            labels = labels_of(index, outputs.samples)
            for own, logits in zip(parts, outputs.logits, strict=True):
                own.append(outcomes_of(logits, labels))
        for row, own in zip(rows, parts, strict=True):
            row.setdefault("outcomes", {})[role] = join(own)


def _measure_files(
    files: Sequence[Path], rows: list[Row], member: Member, splits: dict[str, Index], plain: Row
) -> None:
    for path, row in zip(files, rows, strict=True):
        row |= measure.sizes(path)
        row |= {"parameters": plain["parameters"], "nonzero": None, "flops": None}
        session = open_session(path.read_bytes(), torch.get_num_threads())
        row["outcomes"] = {
            role: outcomes_by(session, member, index) for role, index in splits.items()
        }
        types = operations(path.read_bytes())
        left = types["Conv"] + types["FusedConv"]
        row["convolutions"] = {"int8": types["QLinearConv"], "float32": left}


def _score(rows: list[Row]) -> None:
    """Scores in place of outcomes; each row's `before` is the first one of its runtime."""
    before: dict[str, dict[str, Outcomes]] = {}
    for row in rows:
        found = row.pop("outcomes")
        plain = before.setdefault(row["runtime"], found)
        row["splits"] = {role: measure.scores(found[role], plain[role]) for role in found}


def _time(
    engine: Engine, members: Sequence[Member], files: Sequence[Path], rows: list[Row], rounds: int
) -> None:
    """Medians, and how many times as fast as float32 of the same runtime: a median as well, of
    the ratios within a round."""
    recipe = members[0].recipe
    channels, size = recipe.data.channels, height_width(recipe.eval_size)
    networks = [member.build().to(engine.device) for member in members]
    sessions = [open_session(path.read_bytes(), torch.get_num_threads()) for path in files]
    for row in rows:
        row |= {"latency_ms": {}, "fastest_ms": {}, "speedup": {}}
    for batch in BATCHES:
        images = torch.rand(batch, channels, *size)
        pixels = np.full((batch, *size, channels), 128, np.uint8)
        runs = [partial(_pass, network, images.to(engine.device)) for network in networks]
        runs += [partial(session.run, ["probabilities"], {INPUT: pixels}) for session in sessions]
        with torch.inference_mode(), engine.autocast():
            times = measure.milliseconds(runs, rounds if batch == 1 else max(3, rounds // 4))
        plain: dict[str, Any] = {}
        for row, own in zip(rows, times, strict=True):
            first = plain.setdefault(row["runtime"], own)
            row["latency_ms"][str(batch)] = float(np.median(own))
            row["fastest_ms"][str(batch)] = float(own.min())  # which a busy machine hardly changes
            row["speedup"][str(batch)] = float(np.median(first / own))


def _pass(network: nn.Module, images: Tensor) -> Tensor:
    logits: Tensor = network(images)
    return logits.cpu()  # which waits for a GPU


def _machine(engine: Engine) -> dict[str, Any]:
    found: dict[str, Any] = {
        "system": platform.platform(),
        "processor": _processor(),
        "device": str(engine.device),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
    }
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _processor() -> str:
    """platform.processor() is empty on many Linux systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
