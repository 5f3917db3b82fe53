"""The main job from outside, as a user runs it: commands in, files and numbers out."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_sample_images

from bigbatch.data.index import open_index
from bigbatch.trainers.evaluation.metrics import score, softmax

BIGBATCH = Path(sys.executable).parent / "bigbatch"


def bigbatch(*arguments, cwd, status=0):
    """Run the command line; returns what it wrote to both streams."""
    done = subprocess.run(
        [BIGBATCH, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=900
    )
    said = done.stdout + done.stderr
    assert done.returncode == status, said
    assert status or "Traceback" not in said
    return said


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the digits as shards and one short finished run on two ranks."""
    folder = tmp_path_factory.mktemp("place")
    bigbatch("shard", "digits", "shards/digits", cwd=folder)
    said = bigbatch(
        *("train", "digits", "duration=6 epochs", "schedule.warmup=1 epochs"),
        *("ensemble.selection_margin=1", "--nproc", "2"),
        cwd=folder,
    )
    (folder / "said.txt").write_text(said)
    return folder


def test_a_run_ends_with_its_table_and_its_paths(place):
    said = (place / "said.txt").read_text()
    for word in ("ensemble", "soup", "cycle-03", "summary.json", "report.html", "wandb"):
        assert word in said
    run = place / "runs/digits"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["world_size"] == 2
    assert summary["steps"] * 256 == summary["samples"]
    for split in ("val", "test"):
        for member in [*summary[split]["members"], summary[split]["ensemble"]]:
            assert 0 <= member["accuracy"] <= 1
            assert member["nll"] > 0
    assert (run / "report.html").stat().st_size > 50_000
    assert list((run / "wandb").glob("offline-run-*/*.wandb"))


def test_a_run_is_diagnosed_by_what_it_measured(place):
    """In its last lines as by the command; two ranks look at the training images together."""
    findings = json.loads(bigbatch("diagnose", "digits", "--json", cwd=place))
    assert {"rule", "level", "title", "text", "evidence", "turn"} == findings[0].keys()
    shown = [f["title"] for f in findings if f["level"] != "good"]
    last = (place / "said.txt").read_text().partition("report.html")[2]
    assert all(f"{title}: " in last for title in shown)
    records = [
        json.loads(x) for x in (place / "runs/digits/metrics.jsonl").read_text().splitlines()
    ]
    probes = [r for r in records if r["kind"] == "probe"]
    assert probes[-1]["step"] == max(r["step"] for r in records)
    assert probes[-1]["train"]["samples"] == probes[-1]["images"] >= 64
    assert probes[-1]["val"]["samples"] == 362
    assert probes[-1]["dead"].keys() > {"layer1.0.act1", "layer4.0.act2"}
    gradients = [r for r in records if r["kind"] == "gradients"]
    assert [r["step"] for r in gradients] == [1, *(r["step"] for r in probes)]
    assert gradients[0]["norms"]["fc.weight"] > 0


def test_every_step_stands_once_in_the_metrics(place):
    lines = (place / "runs/digits/metrics.jsonl").read_text().splitlines()
    steps = [r["step"] for r in map(json.loads, lines) if r["kind"] == "train"]
    summary = json.loads((place / "runs/digits/summary.json").read_text())
    assert steps == list(range(1, summary["steps"] + 1))


def test_every_json_of_data_and_run_is_strict(place):
    lines = [path.read_text() for path in place.rglob("*.json")]
    lines += [line for path in place.rglob("*.jsonl") for line in path.read_text().splitlines()]
    assert len(lines) > 50  # steps, evaluations, events and a dozen whole files
    for line in filter(None, lines):  # the heartbeat of a run that has ended is empty
        json.loads(line, parse_constant=pytest.fail)


def test_timm_loads_our_weights_and_gives_the_logits_behind_our_score(place):
    run, index = place / "runs/digits", open_index(place / "shards/digits/test")
    weights = run / "snapshots/cycle-03/model.safetensors"
    model = timm.create_model(
        "test_resnet", num_classes=10, in_chans=1, checkpoint_path=str(weights)
    ).eval()
    ours = timm.create_model("test_resnet", num_classes=10, in_chans=1).eval()
    ours.load_state_dict(load_file(weights))

    # The evaluation's own geometry, by independent means: Pillow's resize, normalise.
    images = []
    for sample in range(len(index)):
        shard = index.root / index.shards[index.shard[sample]].name
        with shard.open("rb") as file:
            file.seek(int(index.offset[sample]))
            image = Image.open(io.BytesIO(file.read(int(index.size[sample]))))
        images.append(np.array(image.resize((32, 32), Image.Resampling.BILINEAR)))
    x = torch.from_numpy(np.stack(images)).float()[:, None] / 255
    with torch.inference_mode():
        logits = model((x - 0.305) / 0.376)
        torch.testing.assert_close(ours((x - 0.305) / 0.376), logits, rtol=0, atol=0)
    found = score(softmax(logits.numpy()), np.asarray(index.label, np.int64))
    summary = json.loads((run / "summary.json").read_text())
    said = next(m for m in summary["test"]["members"] if m["name"] == "cycle-03")
    assert found["accuracy"] == said["accuracy"]
    assert found["nll"] == pytest.approx(said["nll"], rel=1e-6)


def test_a_finished_run_is_never_overwritten(place):
    before = (place / "runs/digits/metrics.jsonl").read_bytes()
    said = bigbatch("train", "digits", "--run", "digits", cwd=place, status=2)
    assert "exists already" in said
    assert (place / "runs/digits/metrics.jsonl").read_bytes() == before


BATCH = ("global_batch=64", "micro_batch=16")  # as many micro-batches as the recipe's own
# Parts of a model that look at more than one image, or draw, or compute twice; all at once.
PARTS = (
    "model.norm={name: batch_renorm, ramp_steps: 3}",
    "model.weight_standardization=true",
    "model.head={name: cosine, feature_norm: batch}",
    "model.attention={name: cbam, stages: [2, 4]}",
    "model.pool={name: stochastic}",
    "model.activation=SiLU",
    "model.recompute=true",
    "model.init={weights: {name: he}, zero_gamma: true}",
)


# The quick one: two world sizes, and one killed and resumed. The slow ones: all that prove tries,
# and a model of many parts.
@pytest.mark.parametrize(
    "options",
    [
        ("--ranks", "1,2", "--steps", "5", *BATCH),
        pytest.param((), marks=pytest.mark.slow),
        pytest.param(("--ranks", "1,2", "--steps", "4", *BATCH, *PARTS), marks=pytest.mark.slow),
    ],
    ids=["two sizes", "all", "a model of many parts"],
)
def test_prove_digits(place, options):
    said = bigbatch("prove", "digits", *options, "--json", cwd=place)
    proof = json.loads(said[said.index("{") : said.rindex("}") + 1])
    assert proof["proven"] is True


@pytest.fixture
def folder_of_images(tmp_path):
    """Crops of two real photos: JPEG and PNG, gray and RGB, many sizes, two classes."""
    generator = np.random.default_rng(0)
    for name, photo in zip(("china", "flower"), load_sample_images().images, strict=True):
        target = tmp_path / "images" / name
        target.mkdir(parents=True)
        for number in range(90):
            height, width = generator.integers(90, 240, 2)
            top = generator.integers(0, photo.shape[0] - height)
            left = generator.integers(0, photo.shape[1] - width)
            crop = Image.fromarray(photo[top : top + height, left : left + width])
            if number % 3 == 0:
                crop = crop.convert("L")
            crop.save(target / f"{number:03d}.{'png' if number % 2 else 'jpg'}")
    return tmp_path


@pytest.mark.slow
def test_an_image_folder_of_your_own(folder_of_images):
    cwd = folder_of_images
    (cwd / "images/flower/notes.jpg").write_text("this is no image")
    said = bigbatch("shard", "images", "shards/mine", cwd=cwd)
    assert "notes" in said  # reported at the end, and gone on without it
    (cwd / "mine.yaml").write_text(
        "data: {path: shards/mine, image_size: 48}\n"
        "model: {name: test_resnet}\n"
        "optimizer: {name: adamw, lr: 0.003}\n"
        "duration: 40 steps\n"
        "augment: {flip: 0.5}\n"
    )
    bigbatch("train", "mine.yaml", "--nproc", "2", cwd=cwd)
    summary = json.loads((cwd / "runs/mine/summary.json").read_text())
    assert summary["test"]["ensemble"]["accuracy"] >= 0.9
    (cwd / "runs/mine/report.html").unlink()
    bigbatch("report", "mine", cwd=cwd)
    report = (cwd / "runs/mine/report.html").read_text()
    assert "china" in report
    assert "flower" in report
