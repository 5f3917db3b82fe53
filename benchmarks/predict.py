"""Scoring a split and predicting: `bigbatch evaluate` against timm's validate.py, and an ensemble
against the sum of its parts.

    python benchmarks/predict.py --timm-validate PATH/validate.py --photos TAR
                                 [--case NAME] [--quick] [--json FILE]

timm's validate.py is not in its wheel: take it from a checkout of pytorch-image-models. The images
are the JPEGs of TAR, as often as it takes; without --photos, crops of scikit-learn's sample photos.

Whole commands, start included, with two threads each: the same weights, images, crop, batch of 256.
validate.py reads an image folder with two workers, bigbatch its shards. Then, inside one process:
a forward pass of each of five members, on images that are decoded already, one pass over the
data without a model, and `Forward` over the same, which does both; members one after another
against members stacked by torch.func, in CPU time; and the peak memory of `predict` over few images
and ten times as many.

Contestants take turns; figures are medians, ratios medians of the rounds'.
"""

import io
import json
import re
import resource
import statistics
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from machine import benchmark_parser, machine, write_figures
from peers import timed
from PIL import Image

BIN = Path(sys.executable).parent
CASES = {"test_resnet at 96": ("test_resnet", 96), "resnet18 at 224": ("resnet18", 224)}
CLASSES, BATCH, MEMBERS, CROP = 10, 256, 5, 0.875
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def jpegs(photos: Path | None) -> list[bytes]:
    if photos is not None:
        with tarfile.open(photos) as tar:
            files = [tar.extractfile(member) for member in tar if member.isfile()]
            return [file.read() for file in files if file is not None]
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    found = []
    for photo in load_sample_images().images * 20:
        top, left = rng.integers(0, 100, 2)
        file = io.BytesIO()
        Image.fromarray(photo[top : top + 300, left : left + 400]).save(file, "JPEG", quality=95)
        found.append(file.getvalue())
    return found


def write_images(folder: Path, photos: list[bytes], count: int) -> None:
    for number in range(count):
        target = folder / f"class{number % CLASSES}"
        target.mkdir(parents=True, exist_ok=True)
        (target / f"{number:06d}.jpg").write_bytes(photos[number % len(photos)])


def write_run(path: Path, shards: Path, model: str, size: int, members: int) -> None:
    """A run whose snapshots hold fresh weights: nobody has to train to be timed."""
    from bigbatch.configs.load import parse_recipe
    from bigbatch.configs.rundir import create_run
    from bigbatch.trainers.ensemble.members import save_snapshot
    from bigbatch.trainers.models.build import build_model
    from bigbatch.trainers.models.weights_file import describe

    recipe = parse_recipe(
        {
            "name": path.name,
            "duration": "1 epochs",
            "data": {
                "path": str(shards), "val": "all", "test": None, "train": "all",
                "image_size": size, "workers": 1, "threads": 1,
            },
            "model": {"name": model},
            "optimizer": {"name": "sgd", "lr": 0.1},
            "augment": {"mean": MEAN, "std": STD},
            "evaluate": {"batch": BATCH, "crop_fraction": CROP},
        },
        "of the benchmark",
    )  # fmt: skip
    run = create_run(path, recipe)
    names = tuple(f"class{k}" for k in range(CLASSES))
    for number in range(1, members + 1):
        network = build_model(recipe.model, classes=CLASSES, channels=3, seed=number)
        save_snapshot(run.snapshots, number, number, network, {}, describe(recipe, names))


def run_bigbatch(folder: Path, number: int, model: str) -> float:
    options = ["--members", "cycle-01", "--out", f"out/{model}-{number}"]
    return timed([str(BIN / "bigbatch"), "evaluate", f"runs/{model}", *options], folder, 2)[0]


def run_timm(folder: Path, number: int, model: str, size: int, script: Path) -> float:
    weights = folder / "runs" / model / "snapshots" / "cycle-01" / "model.safetensors"
    options = f"""
        --data-dir images --split validation --device cpu --no-prefetcher --workers 2
        --model {model} --num-classes {CLASSES} --checkpoint {weights}
        --input-size 3 {size} {size} --crop-pct {CROP} --batch-size {BATCH}
        --mean {" ".join(map(str, MEAN))} --std {" ".join(map(str, STD))}
    """
    return timed([sys.executable, str(script.resolve()), *options.split()], folder, 2)[0]


def commands(
    folder: Path, images: int, rounds: int, script: Path, case: str | None
) -> dict[str, dict[str, float | list[float]]]:
    found: dict[str, dict[str, float | list[float]]] = {}
    for name, (model, size) in CASES.items():
        if case not in (None, name):
            continue
        ours, theirs = [], []
        for number in range(rounds):
            theirs.append(run_timm(folder, number, model, size, script))
            ours.append(run_bigbatch(folder, number, model))
        found[name] = {
            "bigbatch_seconds": ours,
            "timm_seconds": theirs,
            "bigbatch_images_per_s": round(images / statistics.median(ours), 1),
            "timm_images_per_s": round(images / statistics.median(theirs), 1),
            "ratio": round(statistics.median(t / o for t, o in zip(theirs, ours, strict=True)), 2),
        }
        print(f"{name}: {found[name]['ratio']} times timm's images/s, start included")
    return found


PARTS = """
import json, sys, time
import torch
from pathlib import Path
from bigbatch.data.listing import open_listing
from bigbatch.data.batch import Decoding
from bigbatch.data.geometry import View
from bigbatch.data.loader import eval_batches
from bigbatch.trainers.engine import open_engine
from bigbatch.trainers.ensemble.folder import open_ensemble
from bigbatch.trainers.evaluation.evaluate import in_parts
from bigbatch.trainers.inference.forward import Forward

torch.set_num_threads(2)
run, shards, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
engine = open_engine("ddp", "fp32")
ensemble = open_ensemble([Path(run)], "all")
index = open_listing(shards, ensemble.classes).index
forward = Forward(engine, ensemble.members)
recipe = ensemble.members[0].recipe
view = View(recipe.data.image_size, recipe.evaluate.crop_fraction)
decoding = Decoding(view.out, 3, workers=0, threads=1, view=view)
augmenter = forward._loaded[0].augmenter

def batches():
    return eval_batches(index, decoding, batch=forward.batch, rank=0, world=1)

kept = [augmenter.crop_and_warp(b, view).clone() for b in batches()]

def data_pass():
    for b in batches():
        augmenter.crop_and_warp(b, view)

def passes():
    with torch.inference_mode():
        for member in forward._loaded:
            for images in kept:
                in_parts(member.model, member.augmenter.normalise(images.clone()))

def whole():
    for _ in forward.outputs(index):
        pass

found = {"data": [], "passes": [], "ensemble": []}
for number in range(rounds + 1):
    for name, work in (("data", data_pass), ("passes", passes), ("ensemble", whole)):
        started = time.perf_counter()
        work()
        if number:
            found[name].append(time.perf_counter() - started)
print(json.dumps(found))
"""


def parts(folder: Path, model: str, rounds: int) -> dict[str, object]:
    command = [sys.executable, "-c", PARTS, f"runs/{model}", "shards/few", str(rounds)]
    found: dict[str, list[float]] = json.loads(
        timed(command, folder, 2)[1].strip().splitlines()[-1]
    )
    whole = zip(found["ensemble"], found["data"], found["passes"], strict=True)
    ratio = round(statistics.median(e / (d + p) for e, d, p in whole), 3)
    print(f"{MEMBERS} members of {model}: {ratio} times the sum of passes and one data pass")
    return {"seconds": found, "ratio": ratio}


STACKED = """
import copy, json, statistics, sys, time
import timm, torch
from torch.func import functional_call, stack_module_state, vmap

torch.set_num_threads(1)
found = {}
for name, size, batch in (("test_resnet", 96, 256), ("resnet18", 64, 32), ("test_vit", 96, 64)):
    options = {"img_size": size} if "vit" in name else {}
    models = [timm.create_model(name, num_classes=10, **options).eval() for _ in range(5)]
    state = stack_module_state(models)
    skeleton = copy.deepcopy(models[0]).to("meta")
    stacked = vmap(lambda p, b, x: functional_call(skeleton, (p, b), (x,)), in_dims=(0, 0, None))
    images, ratios = torch.randn(batch, 3, size, size), []
    with torch.inference_mode():
        for _ in range(int(sys.argv[1]) + 1):
            started = time.process_time()
            for model in models:
                model(images)
            between = time.process_time()
            stacked(*state, images)
            ratios.append((between - started) / (time.process_time() - between))
    found[f"{name} at {size}"] = round(statistics.median(ratios[1:]), 2)
print(json.dumps(found))
"""


def stacked(folder: Path, rounds: int) -> dict[str, float]:
    """How many times as fast five members are stacked as one after another, in CPU time."""
    said = timed([sys.executable, "-c", STACKED, str(rounds)], folder, 2)[1]
    found: dict[str, float] = json.loads(said.strip().splitlines()[-1])
    print(f"stacked members, times as fast: {found}")
    return found


def peak(command: list[str], folder: Path) -> int:
    """Peak resident memory of a command and what it starts, in MB."""
    measured = (
        "import resource, subprocess, sys\n"
        "status = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode\n"
        "print('peak', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
        "sys.exit(status)"
    )
    said = timed([sys.executable, "-c", measured, *command], folder, 2)[1]
    match = re.search(r"peak (\d+)", said)
    assert match is not None
    return int(match[1]) // 1024


def memory(folder: Path) -> dict[str, int]:
    found = {}
    for split in ("few", "all"):
        out = folder / "out" / f"{split}.parquet"
        out.parent.mkdir(exist_ok=True)
        command = [str(BIN / "bigbatch"), "predict", "runs/test_resnet", f"shards/{split}"]
        found[split] = peak([*command, "--out", str(out)], folder)
    print(f"peak memory: {found['few']} MB, ten times the images {found['all']} MB")
    return found


def shard(folder: Path, name: str, source: str) -> None:
    command = [str(BIN / "bigbatch"), "shard", source, f"shards-{name}", "--split", "1,0,0"]
    timed(command, folder, 2)
    (folder / "shards").mkdir(exist_ok=True)
    (folder / f"shards-{name}" / "train").rename(folder / "shards" / name)


def main() -> None:
    parser = benchmark_parser(__doc__, quick="few images, one round, test_resnet alone")
    parser.add_argument("--timm-validate", type=Path, help="timm's validate.py")
    parser.add_argument("--photos", type=Path, help="tar of JPEGs")
    parser.add_argument("--case", choices=CASES, help="of the whole commands, this one alone")
    options = parser.parse_args()
    images, rounds = (200, 1) if options.quick else (2000, 3)
    figures: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        photos = jpegs(options.photos)
        # An image folder as torchvision and timm read it.
        write_images(folder / "images" / "validation", photos, images)
        shard(folder, "few", "images/validation")
        (folder / "shards" / "all").symlink_to(folder / "shards" / "few")
        for model, size in CASES.values():
            write_run(folder / "runs" / model, folder / "shards", model, size, MEMBERS)
        if options.timm_validate:
            figures["commands"] = commands(
                folder, images, rounds, options.timm_validate, options.case
            )
        else:
            print("skipped: validate.py is not given (--timm-validate)")
        figures["ensemble"] = parts(folder, "test_resnet", rounds)
        figures["stacked"] = stacked(folder, rounds)
        (folder / "shards" / "all").unlink()
        write_images(folder / "many", photos, 10 * images)
        shard(folder, "all", "many")
        figures["peak_mb"] = memory(folder)
    write_figures(
        options.json,
        machine=machine("bigbatch", "timm", "torch", "torchvision", "simplejpeg"),
        images=images,
        photos=len(photos),
        batch=BATCH,
        rounds=rounds,
        peak_of_this=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        **figures,
    )


if __name__ == "__main__":
    main()
