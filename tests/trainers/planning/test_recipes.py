"""The ready recipes: their rates where they come from, and that each one really trains."""

import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from bigbatch import configs
from bigbatch.configs.errors import UserError
from bigbatch.configs.load import builtin_recipes, load_recipe
from bigbatch.configs.model import Model
from bigbatch.configs.rundir import create_run
from bigbatch.configs.schedules import Cosine
from bigbatch.data.writing.shard import shard
from bigbatch.trainers import worker
from bigbatch.trainers.models.build import build_model
from bigbatch.trainers.planning.inputs import fit

IMAGENET, CIFAR = 1_281_167, 45_000
FINETUNE, GROWING = "finetune-bit-r50x1", "cifar10-growing"
APART = "cifar10-post-local"

# Recipe: images in an epoch, global batch, images to a BatchNorm, epochs, weight decay, momentum
# or betas, and the rate at places in the run, in epochs.
EXPECTED = {
    "imagenet-resnet50": (IMAGENET, 1024, 64, 90, 1e-4, 0.9, {5: 0.4}),
    "imagenet-resnet50-nesterov-8k": (IMAGENET, 8192, 64, 90, 1e-4, 0.9, {5: 3.2}),
    "imagenet-resnet50-lars-4k": (IMAGENET, 4096, 64, 42, 2e-4, 0.9, {5: 10.0}),
    "imagenet-resnet50-lars-8k": (IMAGENET, 8192, 64, 44, 2e-4, 0.9, {5: 17.0}),
    "imagenet-resnet50-lars-32k": (IMAGENET, 32768, 128, 58, 2.5e-5, 0.94, {16: 21.2}),
    "imagenet-resnet50-lars-64k": (IMAGENET, 65536, 128, 89, 1e-4, 0.951807, {31: 24.699}),
    "imagenet-resnet50-lamb": (IMAGENET, 8192, 64, 90, 1.5, (0.9, 0.999), {5: 0.02}),
    "imagenet-vit-s16-adamw": (
        IMAGENET, 1024, 64, 90, 0.1, (0.9, 0.999), {10_000 * 1024 / IMAGENET: 0.001},
    ),
    "imagenet-vit-s16-lamb": (
        IMAGENET, 2048, 64, 800, 0.05, (0.9, 0.999), {0: 1e-6, 5: 0.004, 800: 1e-5},
    ),
    "imagenet-resnet50-a1": (
        IMAGENET, 2048, 128, 600, 0.01, (0.9, 0.999), {0: 5e-7, 5: 0.005, 600: 1e-6},
    ),
    "imagenet-resnet50-a2": (
        IMAGENET, 2048, 128, 300, 0.02, (0.9, 0.999), {0: 5e-7, 5: 0.005, 300: 1e-6},
    ),
    "imagenet-resnet50-a3": (
        IMAGENET, 2048, 128, 100, 0.02, (0.9, 0.999), {0: 8e-7, 5: 0.008, 100: 1e-6},
    ),
    "imagenet-convnext-tiny": (
        IMAGENET, 4096, 128, 300, 0.05, (0.9, 0.999), {0: 0, 20: 0.004, 300: 1e-6},
    ),
    "imagenet-mobilenet-v2": (IMAGENET, 1024, 64, 150, 4e-5, 0.9, {0: 0.1, 5: 0.4}),
    "cifar10-resnet18": (CIFAR, 512, 128, 30, 5e-4, 0.9, {3: 0.4}),
    "cifar10-swap": (CIFAR, 4096, 128, 24, 5e-4, 0.9, {5: 3.2, 24: 0.32}),
    "cifar10-airbench": (CIFAR, 1024, 256, 9.9, 0.00133, 0.85, {0: 0.3, 9.9: 0.105}),
    "cifar10-muon": (CIFAR, 2000, 250, 8, 0, 0.6, {0: 0.24, 4: 0.12, 8: 0.0}),
    "imagenet-resnet50-muon": (IMAGENET, 8192, 64, 90, 0.05, 0.95, {5: 0.02}),
}  # fmt: skip


def rates(recipe, images):
    """The plan of a run over an epoch of so many images, and its rate by the step."""
    plan, factor = fit(recipe, images)
    return plan, lambda step: recipe.optimizer.lr * factor(step)


@pytest.mark.parametrize("name", EXPECTED)
def test_values_are_those_of_the_source(name):
    images, batch, micro, epochs, decay, memory, places = EXPECTED[name]
    recipe = load_recipe(name)
    optimizer = recipe.optimizer
    assert (recipe.global_batch, recipe.micro_batch) == (batch, micro)
    assert str(recipe.duration) == f"{epochs} epochs"
    assert optimizer.weight_decay == decay
    assert getattr(optimizer, "momentum", getattr(optimizer, "betas", None)) == memory
    plan, rate = rates(recipe, images)
    assert plan.total == pytest.approx(epochs * images / batch, abs=1)
    for epoch, value in places.items():
        assert rate(math.ceil(epoch * images / batch - 1e-6)) == pytest.approx(value, rel=1e-9)


def test_every_recipe_but_the_main_job_is_in_the_table():
    assert set(builtin_recipes()) - {"digits", FINETUNE, GROWING, APART} == set(EXPECTED)


def test_batches_grow_where_the_rate_of_the_source_falls():
    """At 60, 120 and 160 epochs, where Zagoruyko and Komodakis divide the rate by 5."""
    recipe = load_recipe(GROWING)
    plan, rate = rates(recipe, CIFAR)
    assert (recipe.micro_batch, recipe.optimizer.weight_decay) == (128, 5e-4)
    for epoch, batch in ((0, 128), (59.9, 128), (60.1, 640), (120.1, 3200), (160.4, 16_000)):
        step = plan.timeline.reaching(epoch * CIFAR)
        assert (plan.timeline.batch(step), rate(step)) == (batch, 0.1)
    # 60, 60, 40 and 40 epochs; each but the last is rounded up to whole steps.
    assert plan.total == pytest.approx(
        CIFAR * sum((60 / 128, 60 / 640, 40 / 3200, 40 / 16_000)), abs=3
    )


def test_rounds_are_of_updates_at_the_rate_of_their_batch():
    recipe = load_recipe(APART)
    plan, rate = rates(recipe, CIFAR)
    first = plan.timeline.reaching(15 * CIFAR)
    assert plan.timeline.batch(first - 1) == 2048
    assert plan.timeline.batch(first) == 16 * 2048
    assert rate(math.ceil(3 * CIFAR / 2048)) == pytest.approx(0.1 * 2048 / 128, rel=1e-2)


def test_workers_end_a_trunk_at_a_small_batch_and_a_rate_that_falls_to_0():
    recipe = load_recipe("cifar10-swap")
    assert recipe.phases is not None
    assert (recipe.phases.global_batch, recipe.phases.workers) == (512, 4)
    assert recipe.optimizer.scale.factor(512) * recipe.phases.lr == pytest.approx(0.1)
    assert recipe.phases.schedule == Cosine(name="cosine")


def test_fine_tuning_follows_the_hyper_rule():
    """big_transfer's bit_hyperrule.py, get_lr of step and 100,000 images."""
    recipe = load_recipe(FINETUNE)
    plan, rate = rates(recipe, 100_000)
    assert (plan.total, recipe.global_batch, recipe.optimizer.weight_decay) == (10_000, 512, 0)
    for step, value in ((0, 0), (250, 0.0015), (500, 0.003), (2999, 0.003), (3001, 0.0003),
                        (6001, 3e-5), (9999, 3e-6)):  # fmt: skip
        assert rate(step) == pytest.approx(value, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize(
    ("name", "size", "repeats", "mixup", "magnitude", "drop_path"),
    [("a1", 224, 3, 0.2, 7, 0.05), ("a2", 224, 3, 0.1, 7, 0.05), ("a3", 160, 1, 0.1, 6, 0.0)],
)
def test_resnet_strikes_back_as_its_second_table_says(
    name, size, repeats, mixup, magnitude, drop_path
):
    recipe = load_recipe(f"imagenet-resnet50-{name}")
    augment = recipe.augment
    assert (recipe.data.image_size, recipe.eval_size) == (size, 224)
    assert recipe.evaluate.crop_fraction == 0.95
    assert recipe.data.repeats == repeats
    assert (augment.mixup, augment.cutmix, augment.mix_switch) == (mixup, 1.0, None)
    (op,) = augment.ops
    assert (op.name, op.magnitude, op.convention, op.n) == ("randaugment", magnitude, "timm", 2)
    assert recipe.model.options == {"drop_path_rate": drop_path}
    assert (recipe.loss.name, recipe.clip.limit) == ("bce", 1.0)


def test_convnext_is_averaged_with_its_decay():
    recipe = load_recipe("imagenet-convnext-tiny")
    plan, _ = rates(recipe, IMAGENET)
    assert math.exp(-plan.average.decay_rate) == pytest.approx(0.9999, abs=1e-8)
    assert [op.name for op in recipe.augment.ops] == ["randaugment", "erasing"]


def test_airbench_decouples_rate_and_decay_as_its_authors_do():
    """airbench94.py: lr 11.5 and decay 0.0153 for 1,024 images, of a loss that is a sum."""
    optimizer = load_recipe("cifar10-airbench").optimizer
    kilostep = 1024 * (1 + 1 / (1 - optimizer.momentum))
    lr, decay = 11.5 / kilostep, 0.0153 * 1024 / kilostep
    assert optimizer.lr == pytest.approx(lr * 1024, rel=1e-3)  # of a mean
    assert optimizer.weight_decay == pytest.approx(decay / lr / 1024, rel=1e-3)


def test_muon_on_cifar_has_the_steps_of_its_source():
    """airbench94_muon.py: 25 batches of 2,000 an epoch, lr (1 - step / steps), 3 iterations."""
    recipe = load_recipe("cifar10-muon")
    plan, rate = rates(recipe, 50_000)
    assert plan.total == 8 * 25
    for step in range(plan.total):
        assert rate(step) == pytest.approx(0.24 * (1 - step / plan.total))
    optimizer = recipe.optimizer
    assert (optimizer.nesterov, optimizer.ns_steps, optimizer.ns_precision) == (True, 3, "bf16")
    assert recipe.loss.label_smoothing == 0.2
    (op,) = recipe.augment.ops
    assert (op.name, op.padding, recipe.augment.border) == ("pad_crop", 2, "reflect")


def test_muon_on_imagenet_has_lamb_s_rate_and_is_marked_untested():
    recipe, lamb = (load_recipe(f"imagenet-resnet50-{name}") for name in ("muon", "lamb"))
    for step in (0, 100, 9000):
        ours, theirs = (rates(r, IMAGENET)[1](step) for r in (recipe, lamb))
        assert ours == theirs
    assert recipe.optimizer.rest.weight_decay == lamb.optimizer.weight_decay
    folder = Path(configs.__file__).parent
    assert "UNTESTED AT SCALE" in (folder / "imagenet-resnet50-muon.yaml").read_text()


# The steps of MLPerf's decay after the warmup, from the hyperparameters of the runs in which they
# stand as such; the others' are their epochs of training times the steps of an epoch.
DECAY_STEPS = {"4k": 42 * 312.8 - 5 * 312.8, "8k": 6095, "32k": 2267 - 16 * 39.1, "64k": 1133}


@pytest.mark.parametrize("size", DECAY_STEPS)
def test_lars_decays_by_a_polynomial_of_power_two(size):
    recipe = load_recipe(f"imagenet-resnet50-lars-{size}")
    plan, rate = rates(recipe, IMAGENET)
    warmup = recipe.schedule.warmup.steps(recipe.global_batch, IMAGENET)
    assert rate(warmup // 2) == pytest.approx(recipe.optimizer.lr * (warmup // 2) / warmup)
    half = warmup + (plan.total - warmup) // 2
    left = (plan.total - half) / (plan.total - warmup)
    lr, end = recipe.optimizer.lr, 1e-4
    assert rate(half) == pytest.approx((lr - end) * left**2 + end, rel=1e-6)
    assert rate(plan.total) == pytest.approx(end, rel=1e-3)
    assert plan.total - warmup == pytest.approx(DECAY_STEPS[size], rel=0.002)
    assert recipe.optimizer.momentum_form == "lr_inside"
    assert (recipe.optimizer.trust_coefficient, recipe.optimizer.eps) == (0.001, 0.0)
    assert recipe.loss.label_smoothing == 0.1


def test_mobile_recipe_rises_linearly_and_falls_by_a_cosine():
    recipe = load_recipe("imagenet-mobilenet-v2")
    plan, rate = rates(recipe, IMAGENET)
    warmup = math.ceil(5 * IMAGENET / 1024)
    assert rate(warmup // 2) == pytest.approx(0.1 + 0.3 * (warmup // 2) / warmup)
    quarter = warmup + (plan.total - warmup) // 4
    place = (quarter - warmup) / (plan.total - warmup)
    assert rate(quarter) == pytest.approx(0.2 * (1 + math.cos(math.pi * place)))
    assert recipe.model.options == {"drop_rate": 0.2}


def test_nesterov_goes_over_to_the_square_root_rule():
    rule = "optimizer.scale={rule: sqrt, base_batch: 1024}"
    recipe = load_recipe("imagenet-resnet50-nesterov-8k", ["optimizer.lr=0.4", rule])
    assert recipe.optimizer.lr * recipe.lr_scale == pytest.approx(0.4 * math.sqrt(8))


@pytest.mark.parametrize("power", range(7))
def test_lamb_follows_the_untuned_rates(power):
    batch = 512 * 2**power
    recipe = load_recipe("imagenet-resnet50-lamb", [f"global_batch={batch}"])
    untuned = 4 / (2 ** (3 - power / 2) * 100)  # You et al. 2020: 512 to 32k
    assert recipe.optimizer.lr * recipe.lr_scale == pytest.approx(untuned)


def test_lamb_at_32k_rises_and_falls_linearly_in_the_steps_of_the_authors():
    overrides = ["global_batch=32768", "schedule.warmup=20 epochs"]
    recipe = load_recipe("imagenet-resnet50-lamb", overrides)
    plan, rate = rates(recipe, IMAGENET)
    assert plan.total == 3519
    assert rate(782) == pytest.approx(0.04)
    assert rate(391) == pytest.approx(0.02)
    assert rate(2150) == pytest.approx(0.04 * (3519 - 2150) / (3519 - 782), rel=1e-9)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 40 noise images of 32 pixels in two classes."""
    root = tmp_path_factory.mktemp("noise")
    rng = np.random.default_rng(0)
    for name in ("left", "right"):
        (root / "images" / name).mkdir(parents=True)
        for number in range(20):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / name / f"{number}.png")
    shard(str(root / "images"), root / "shards", progress=False)
    return root / "shards"


# Model and optimizer of these are those of another recipe; LARS trains in the digits', and the
# Vision Transformer with AdamW.
ALIKE = (
    *("-nesterov-8k", "-lars-4k", "-lars-8k", "-lars-32k", "-lars-64k", "-vit-s16-lamb"),
    *("-a1", "-a2", "-growing", "-muon"),
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow if n.endswith(ALIKE) else ())
        for n in (*EXPECTED, FINETUNE, GROWING, APART)
    ],
)
def test_each_recipe_trains_a_step(name, images, tmp_path):
    overrides = [
        f"data.path={images}",
        "data.image_size=32",
        "data.workers=0",
        "global_batch=4",
        "micro_batch=2",
        "precision=fp32",
        "duration=2 steps",
        "schedule.warmup=0 steps",
        "model.pretrained=false",
        "evaluate.every=2 steps",
        "log.wandb=off",
    ]
    if name == FINETUNE:
        overrides.append("schedule.milestones=[1 steps]")
    if "-s16-lamb" in name or name.endswith(("-a1", "-a2")):
        overrides.append("global_batch=8")  # of three views of each sample
    if name.endswith("-a3"):
        overrides.append("evaluate.image_size=48")
    if "vit" in name:
        overrides.append("model.options.img_size=32")
    recipe = load_recipe(name, overrides)
    run = create_run(tmp_path / name, recipe)
    assert worker.main([str(run.path), "--stop-at", "1"]) == 0
    after = load_file(run.checkpoints / "step-00000001" / "model.safetensors")
    before = build_model(recipe.model, classes=2, channels=3, seed=recipe.seed).state_dict()
    assert all(torch.isfinite(value).all() for value in after.values())
    changed = [key for key, value in after.items() if not torch.equal(value, before[key])]
    assert len(changed) > 0.9 * len(after) / 2  # LayerScale and zero-initialised ends lag a step


def test_small_stem_keeps_the_resolution_and_only_fits_resnets():
    config = Model(name="resnet18", stem="small")
    model = build_model(config, classes=10, channels=3, seed=0)
    assert model.forward_features(torch.zeros(1, 3, 32, 32)).shape == (1, 512, 4, 4)
    names = timm.create_model("resnet18", num_classes=10).state_dict().keys()
    assert model.state_dict().keys() == names
    with pytest.raises(UserError, match=r"model\.stem = small .* not vit_tiny_patch16_224"):
        build_model(
            Model(name="vit_tiny_patch16_224", stem="small"), classes=10, channels=3, seed=0
        )
