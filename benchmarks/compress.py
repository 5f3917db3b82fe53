"""int8 beside float32 in onnxruntime: milliseconds, and accuracy where a trained run is given.

    python benchmarks/compress.py [--quick] [--json FILE] [--threads N] [--run RUN]

Speed: resnet18 of 1,000 classes with random weights at 224 pixels, which take as long as
trained ones; the network alone, without preprocessing. float32, what `bigbatch compress
--method int8` makes (uint8 activations), and onnxruntime's default (int8 activations) take
turns, one pass each, at batch 1 and 32. Each ratio is the median of those within a round.
Accuracy: with --run, `bigbatch compress RUN --method int8` on its validation and test splits.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from machine import benchmark_parser, machine, write_figures

from bigbatch.trainers.compress.candidates import Settings
from bigbatch.trainers.compress.int8 import quantise
from bigbatch.trainers.compress.measure import milliseconds
from bigbatch.trainers.compress.onnx_parts import IMAGES, network_part, open_session, operations
from bigbatch.trainers.compress.sweep import sweep
from bigbatch.trainers.compress.variants import make_variants
from bigbatch.trainers.engine import open_engine
from bigbatch.trainers.ensemble.folder import open_ensemble

BATCHES = (1, 32)
GOALS = {1: 2.5, 32: 1.8}  # times float32


def speed(size: int, rounds: int, threads: int) -> dict[str, Any]:
    torch.manual_seed(0)
    plain = network_part(timm.create_model("resnet18").eval(), 3, size)
    generator = np.random.default_rng(0)
    seen = [generator.normal(size=(8, 3, size, size)).astype(np.float32) for _ in range(4)]
    models = {
        "float32": plain,
        "int8": quantise(plain, seen),
        "int8, onnxruntime's own": as_by_default(plain, seen),
    }
    figures: dict[str, Any] = {}
    title = f"resnet18 at {size}, threads {threads}"
    print(f"{title:28}convolutions      batch 1 ms, times float32      batch 32 ms, times float32")
    sessions = [open_session(model, threads) for model in models.values()]
    times = {}
    for batch in BATCHES:
        images = generator.normal(size=(batch, 3, size, size)).astype(np.float32)
        runs = [lambda s=s, x=images: s.run(None, {IMAGES: x}) for s in sessions]
        times[batch] = milliseconds(runs, rounds if batch == 1 else max(2, rounds // 5))
    for place, (name, model) in enumerate(models.items()):
        types = operations(model)
        row: dict[str, Any] = {"int8": types["QLinearConv"], "float32": types["Conv"], "batch": {}}
        for batch in BATCHES:
            own, reference = times[batch][place], times[batch][0]
            row["batch"][batch] = {
                "median_ms": round(statistics.median(own), 3),
                "times_float32": round(float(np.median(reference / own)), 2),
            }
        figures[name] = row
        shown = "".join(
            f"{row['batch'][b]['median_ms']:14.2f}{row['batch'][b]['times_float32']:15.2f}"
            for b in BATCHES
        )
        print(f"{name:28}{row['int8']:2} int8 {row['float32']:2} float32{shown}")
    met = {b: figures["int8"]["batch"][b]["times_float32"] >= goal for b, goal in GOALS.items()}
    print(f"goals {GOALS}: {met}")
    return figures


def as_by_default(network: bytes, images: list[np.ndarray]) -> bytes:
    """What onnxruntime's quantize_static makes where it is told nothing: int8 activations."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.images = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            seen = next(self.images, None)
            return None if seen is None else {IMAGES: seen}

    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("a.onnx", "b.onnx")]
        paths[0].write_bytes(network)
        quantize_static(paths[0], paths[1], Reader())
        return paths[1].read_bytes()


def accuracy(run: Path, images: int) -> dict[str, Any]:
    """The int8 file of a run's only member beside its float32 file, on every split."""
    (member,) = open_ensemble([run]).members
    engine = open_engine("ddp", member.recipe.precision)
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(images=images, rounds=3)
        result = sweep(engine, member, make_variants("int8"), settings, Path(folder) / "int8")
    *_, before, after = result["results"]
    for role, scores in after["splits"].items():
        low, high = (100 * end for end in scores["change_interval"])
        plain = before["splits"][role]["accuracy"]
        print(
            f"{role}, {result['splits'][role]['samples']:,} images: {plain:.2%} in float32, "
            f"{scores['accuracy']:.2%} in int8, "
            f"change {100 * scores['change']:+.2f} points ({low:+.2f} to {high:+.2f})"
        )
    recipe = member.recipe
    return {
        "model": recipe.model.model_dump(),
        "image_size": recipe.data.image_size,
        "duration": str(recipe.duration),
        "samples": {role: split["samples"] for role, split in result["splits"].items()},
        "before": before,
        "after": after,
    }


def main() -> None:
    parser: argparse.ArgumentParser = benchmark_parser(
        __doc__, quick="96 pixels and 3 rounds instead of 224 and 50"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--run", type=Path, help="a run with one member, for the accuracy")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size, rounds = (96, 3) if options.quick else (224, 50)
    figures: dict[str, Any] = {"speed": speed(size, rounds, options.threads)}
    if options.run is not None:
        figures["accuracy"] = accuracy(options.run, 512)
    where = machine("bigbatch", "onnxruntime", "timm", "torch", rounds=rounds, size=size)
    write_figures(options.json, machine=where, figures=figures)


if __name__ == "__main__":
    main()
