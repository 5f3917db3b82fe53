"""What a run will need, before it starts."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import change_recipe, load_recipe
from bigbatch.data import index_files
from bigbatch.launcher import estimate
from bigbatch.launcher.preflight import check, fit_rate, spark
from bigbatch.trainers.models.size import measure
from bigbatch.trainers.models.weights_file import describe
from bigbatch.trainers.monitoring.flops import flops_per_image
from bigbatch.trainers.recovery.tensor_files import write_tensors

RESNET = [
    *("model.name=resnet50", "model.options={}", "data.channels=3", "data.image_size=224"),
    *("augment.mean=[0,0,0]", "augment.std=[1,1,1]"),
]
SIZE = {
    "parameters": 1_000,
    "weight_bytes": 4_400,
    "gradient_bytes": 4_000,
    "optimizer_bytes": 8_000,
    "activation_bytes": 10_000,
    "rates": [],
}


def test_sizes_of_a_known_model() -> None:
    size = measure(load_recipe("digits", RESNET), 1000)
    # torchvision's documentation: ResNet-50 has 25,557,032 parameters.
    assert size["parameters"] == 25_557_032
    assert size["gradient_bytes"] == size["optimizer_bytes"] == 4 * 25_557_032  # LARS: momentum
    assert size["weight_bytes"] == 4 * (25_557_032 + 53_120) + 8 * 53  # BatchNorm: 53 layers
    # Two kept maps of about 11 M values a convolution and its norm: some 90 MB an image.
    assert 70e6 < size["activation_bytes"] < 110e6
    half = measure(load_recipe("digits", [*RESNET, "precision=bf16"]), 1000)
    assert half["activation_bytes"] == pytest.approx(size["activation_bytes"] / 2, abs=1)


def test_memory_and_disk_add_up() -> None:
    recipe = load_recipe("digits", ["micro_batch=64", "checkpoint.keep=2"])
    assert estimate.memory(recipe, SIZE) == {
        "weights": 4_400,
        "gradients": 4_000,
        "optimizer": 8_000,
        "exact sums": 8_000,
        "activations": 640_000,
        "images": 2 * 64 * 4 * 32 * 32,
    }
    plan, _ = fit_rate(recipe, 1078)
    checkpoints = 2 + recipe.checkpoint.keep_best + 1
    kept = checkpoints * 12_400 + (3 + 1) * 4_400  # three cycles, and the soup
    assert estimate.disk_bytes(recipe, plan, SIZE) == round(1.2 * kept)
    averaged = change_recipe(recipe, ["average={name: ema, half_life: 1 epochs}"])
    assert estimate.memory(averaged, SIZE)["average"] == 8_000  # float64
    kept += checkpoints * 8_000 + 4_400  # and the model at the end
    assert estimate.disk_bytes(averaged, plan, SIZE) == round(1.2 * kept)


@pytest.mark.parametrize(("save_s", "lead"), [(0, 120), (30, 120), (31, 180), (600, 1260)])
def test_the_signal_comes_early_enough_to_save_twice(save_s: float, lead: int) -> None:
    assert estimate.signal_lead(save_s) == lead


def test_a_lead_or_a_disk_that_does_not_suffice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = {"state": "warning", "text": "gradients vanish", "layers": [{"name": "conv1"}]}
    size = {**SIZE, "weight_bytes": 10**15, "signal": first}
    monkeypatch.setattr(estimate, "model_size", lambda *_: size)
    recipe = load_recipe("digits", ["log.wandb=off"])
    plan, _ = fit_rate(recipe, 1078)
    found = estimate.look(recipe, plan, 1078, 10, tmp_path / "runs", 120)
    states = {finding.name: (finding.state, finding.text) for finding in found.findings}
    assert states["disk"][0] == states["saving"][0] == "warning"
    assert states["first step"] == ("warning", "gradients vanish")
    assert found.layers == ({"name": "conv1"},)
    assert "--signal-lead" in states["saving"][1]
    assert states["wandb"] == ("ok", "off")
    assert list(tmp_path.iterdir()) == []  # nothing is left of the measurement


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "inception_v3"])
def test_images_that_a_model_cannot_take_are_refused(name: str) -> None:
    """One says so itself, of one only a convolution does; the rank that counts says it, too."""
    recipe = load_recipe("digits", [f"model.name={name}"])
    with pytest.raises(UserError, match=rf"model {name} cannot take images of \[1, 32, 32\]"):
        estimate.model_size(recipe, 10)
    with pytest.raises(UserError, match=rf"model {name} cannot take images of \[1, 32, 32\]"):
        flops_per_image(recipe, 10)


def test_without_torch_it_is_skipped_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "find_spec", lambda name: None)
    monkeypatch.setenv("WANDB_MODE", "offline")
    recipe = load_recipe("digits")
    plan, _ = fit_rate(recipe, 1078)
    found = estimate.look(recipe, plan, 1078, 10, tmp_path, None)
    first = found.findings[0]
    assert (first.state, first.text) == ("skipped", "no torch on this machine")
    assert found.lead is None


def test_a_model_that_cannot_be_built_is_refused() -> None:
    with pytest.raises(UserError, match=r"^model\.name = 'resnet51' is no timm model; did you"):
        estimate.model_size(load_recipe("digits", ["model.name=resnet51"]), 10)


def test_a_wandb_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    finding = estimate._wandb(load_recipe("digits"))
    assert finding.state == "warning"
    assert "go on offline" in finding.text


def test_sparklines() -> None:
    assert spark([0, 1, 2, 4, 8]) == " ▁▂▄█"
    assert spark([0.0, 0.0]) == "  "
    assert len(spark(list(range(1000)))) == 60


def test_a_damaged_column_is_found_here_and_not_first_in_training(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where an index is too large to be read whenever it is opened."""
    monkeypatch.setattr(index_files, "_READ_AT_OPEN", 0)
    shards = tmp_path / "digits"
    shutil.copytree(digits, shards)
    recipe = load_recipe("digits", [f"data.path={shards}"])
    check(recipe, None)
    label = np.load(shards / "val" / "index" / "label.npy", mmap_mode="r+")
    label[7] = 10
    label.flush()
    with pytest.raises(UserError, match=r"val/index/label\.npy is damaged .*bigbatch index"):
        check(recipe, None)


def test_weights_to_start_from_are_looked_at(digits: Path, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    recipe = load_recipe("digits", [f"data.path={digits}", f"model.checkpoint={path}"])
    with pytest.raises(UserError, match=r"weights\.safetensors cannot be read"):
        check(recipe, None)
    path.write_bytes(b"no weights at all")
    with pytest.raises(UserError, match=r"weights\.safetensors is damaged: a header of"):
        check(recipe, None)
    info = describe(recipe, tuple("0123456789"))
    write_tensors(path, {"a": torch.zeros(2)}, info)
    assert check(recipe, None)["weights"] == ["trained for the same"]
    write_tensors(path, {"a": torch.zeros(2)}, replace(info, mean=(0.5,), classes=("a", "b")))
    mean, classes = check(recipe, None)["weights"]
    assert "set augment.mean=[0.5]" in mean
    assert "their classes are others (2 and 10 of them)" in classes
    write_tensors(path, {"a": torch.zeros(2)})
    assert check(recipe, None)["weights"] == ["they do not say what they were trained for"]


def test_scores_that_do_not_fit_are_known_before_training() -> None:
    """They grow with samples and with classes, never with their product."""
    fits = estimate.scores_memory([1000, 500], 10, 3, 64)
    assert (fits.state, "about 1.1 MB" in fits.text) == ("ok", True)
    assert "about 1.07 GB" in estimate.scores_memory([1_000_000], 100_000, 2, 64).text
    large = estimate.scores_memory([10**9], 100_000, 2, 64)
    assert large.state == "warning"
    assert "fewer snapshots" in large.text
