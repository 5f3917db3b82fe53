"""Recipes whose keys are right one by one and cannot train together, or compute what none means."""

import pytest

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import builtin_recipes, change_recipe, load_recipe, parse_recipe

SWAP = "phases={name: swap, workers: 3, duration: 2 epochs, global_batch: 64}"
APART = (
    "global_batch={name: post_local, batch: 256, workers: 4, every: 8, start: 2 epochs}",
    *("optimizer={name: sgd, lr: 0.1}", "schedule={name: cosine, warmup: 1 epochs}"),
)
COLOUR = ("data.channels=3", "augment.mean=[0.5, 0.5, 0.5]", "augment.std=[0.5, 0.5, 0.5]")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        # One channel has no colour (hue ended in a traceback at the first step).
        (["augment.jitter.hue=0.1"], "data.channels = 1 have no colour; set augment.jitter.hue"),
        (["augment.jitter.saturation=0.1"], "data.channels = 1 have no colour"),
        (["augment.crop={scale: [1, 0.35]}"], r"scale \[1, 0.35\]: put the lower bound first"),
        (["augment.crop={ratio: [1.5, 0.5]}"], r"ratio \[1.5, 0.5\]: put the lower bound first"),
        (["augment.crop={ratio: [1, 1e300]}"], "at most 100 times as wide as high"),
        (["augment.affine.shear=90"], r"augment.affine.shear = 90: .* less than 90"),
        (["augment.affine.degrees=1e300"], "less than or equal to 360"),
        # Factors below 0 turn an image into its negative.
        (["augment.jitter.contrast=1.5"], r"augment.jitter.contrast = 1.5: .* less than or equal"),
        (["augment.mean=[123.7]"], r"mean \[123.7\] .* divide those of pixels in 0..255 by 255"),
        (["augment.std=[58.4]"], "are no values of pixels in"),
        (["augment.std=[1e-39]"], "give no channel a std below 0.001"),
        (["micro_batch=1"], "augment.mixup = 0.1 mixes the images of a micro-batch"),
        (["evaluate.crop_fraction=1e-9"], "greater than or equal to 0.1"),
        (["model.options.num_classes=5"], "num_classes: it follows from the classes of the data"),
        (["model.options.in_chans=3"], "model.options.in_chans: write data.channels"),
        (["model.options.pretrained=true"], "model.options.pretrained: write model.pretrained"),
        (["model.options.checkpoint_path=x"], "checkpoint_path: write model.checkpoint"),
        (["model.options.features_only=true"], "a classifier's logits"),
        (["model.options.drop_rate=5"], "drop_rate = 5 is no probability"),
        (["model.options.drop_path_rate=abc"], "drop_path_rate = 'abc' is no probability"),
        (["model.checkpoint=''"], "at least 1 character"),  # it asked timm's hub for weights
        (["model.options.img_size=48"], "img_size = 48 and data.image_size = 32 differ"),
        (["model.options.img_size=[32, 48]"], r"img_size = \[32, 48\] and data.image_size = 32"),
        (["data.sampling={name: easy_ensemble, member: 99999999999}"], "less than 2147483648"),
        (["data.train=../train"], "data.train '../train' leads out of data.path"),
        (["data.val=/data/val"], "data.val '/data/val' leads out of data.path"),
        (["data.threads=100000"], "less than or equal to 1024"),
        (["data.stream=['']", "data.sampling=uniform"], "data.stream names an empty place"),
        (["average={name: ema}"], "average.half_life: missing"),
        (["average={name: ema, half_life: 0 samples}"], "half_life: 0 samples is no time at all"),
        (["average={name: ema, half_life: 1 epochs, every: 2 epochs}"], "every: unknown key"),
        (["average={name: swa}"], "average.start: missing"),
        (
            ["average={name: swa, start: 3 epochs, every: often}"],
            "every: 'often' is not a du.*; or write cycle",
        ),
        (
            ["average={name: swa, start: 3 epochs, every: cycle}", "schedule={name: cosine}"],
            "average.every: cycle needs the schedule cycles, not cosine; set average.every to a d",
        ),
        (["average={name: median}"], "average"),
        # Workers that train apart.
        ([*APART, "global_batch.workers=3"], "batch 256 is no equal share for each of 3 workers"),
        ([*APART, "micro_batch=128"], "256 for 4 workers is 64 for each, .* micro_batch 128"),
        ([*APART, "global_batch.lr=linear"], "each update is one of `batch` samples"),
        ([*APART, "global_batch.every=1"], "every = 1: .* greater than or equal to 2"),
        ([*APART, "global_batch.start=40 steps"], "start = 40 steps: the batch is a function of"),
        ([*APART, "backend=zero1"], "zero1 cannot have reduction exact"),
        ([*APART, "reduction=overlapped"], "reduction overlapped exchanges gradients in each"),
        ([*APART, "optimizer={name: lars, lr: 2.0}"], "optimizer lars has state whose average"),
        ([*APART, "precision=fp16"], "precision fp16 has one loss scale for all; take bf16"),
        (
            [*APART, "regularise.sharpness={name: sam}"],
            "sharpness moves the weights between passes",
        ),
        ([*APART, "model.compile=true"], "model.compile keeps one set of weights"),
        ([*APART, "loss=center"], "loss center learns beside them"),
        (
            [*APART, "recovery.corruption.recompute_every=4"],
            "recompute_every computes micro-batches of another worker; set it to null",
        ),
        # Behind the run.
        (["phases=post_local"], "phases"),
        ([SWAP, "phases.workers=1"], "phases.workers = 1: .* greater than or equal to 2"),
        ([SWAP, "phases.global_batch=96"], "96 is not a multiple of the workers' micro_batch 64"),
        ([SWAP, "phases.micro_batch=48"], "64 is not a multiple of the workers' micro_batch 48"),
        ([SWAP, "phases.schedule=plateau"], "phases.schedule cannot hold a plateau"),
        ([SWAP, "phases.lr=0"], "phases.lr = 0: .* greater than 0"),
        (
            [
                SWAP,
                "global_batch={name: noise_scale, start: 128, most: 256, every: 5 epochs}",
                "schedule={name: constant, warmup: 0 epochs}",
            ],
            "phases begin at a step that is known ahead, .* set global_batch to a number or stages",
        ),
        (
            [SWAP, "regularise.early_stop={patience: 3}", "schedule=cosine"],
            "early_stop goes back to the best evaluation, and phases go on from the last step",
        ),
        ([SWAP, "optimizer.momentum_schedule=cosine"], "momentum_schedule is of a whole run"),
        ([SWAP, "loss=l1"], "loss l1 learns targets, and the average of phases is judged by"),
        # The list of operations: each names its place.
        (["augment.ops=[{name: rotat}]"], r"augment.ops.0 = 'rotat': did you mean rotate"),
        (["augment.ops=[invert, {name: cutout, p: 2}]"], "augment.ops.1.p = 2: .* less than or eq"),
        (["augment.ops=[{name: invert, p: 0}]"], "augment.ops.0.p = 0: .* greater than 0"),
        (["augment.ops=[{name: blur, sigmas: [1, 2]}]"], "ops.0.sigmas: unknown key; did you mean"),
        (["augment.ops=[{name: blur, sigma: [2, 1]}]"], r"sigma \[2, 1\]: put the lower bound fir"),
        (["augment.ops=[autoaugment]"], "augment.ops.0.policy: missing"),
        (["augment.ops=[{name: shear, x: 0}]"], "nothing is sheared; set one of them"),
        (["augment.ops=[{name: perspective, distortion: 0.9}]"], "less than or equal to 0.6"),
        (
            ["augment.ops=[{name: pad_crop, padding: 32}]"],
            "padding = 32 is no less than the images' 32",
        ),
        (["data.image_size=4"], "data.image_size: 4 is no size of images: .* from 8 to 4096"),
        (["data.image_size=[32, 8, 9]"], r"\[32, 8, 9\] is no size of images: write the pixels"),
        (["evaluate.image_size=true"], "True is no size of images"),
        (
            ["evaluate={crop_mode: squash, crop_fraction: 0.9}"],
            "0.9 leaves out the edges that crop_mode squash shows; set crop_fraction to 1",
        ),
        (
            ["data.progressive={start: [16, 48], until: 3 epochs}"],
            r"data.progressive.start = 16 x 48 is no smaller than data.image_size = 32",
        ),
        (["augment.ops=[{name: cutout, size: 64}]"], "size = 64 covers every image"),
        (["augment.ops=[grayscale]"], "grayscale needs three channels, and data.channels is 1"),
        (["augment.ops=[hsv]"], "hsv needs three channels"),
        (["augment.ops=[pca]"], "pca has eigenvectors of 3 channels, and data.channels is 1"),
        (
            [*COLOUR, "augment.ops=[{name: pca, eigenvectors: [[1], [1], [1]]}]"],
            "a column for each of 3 eigenvalues",
        ),
        (["augment.ops=[erasing, invert]"], "ops.1: invert would change what erasing filled in"),
        (["augment.ops=[cutout, randaugment]"], "put erasing and cutout last"),
        (
            ["augment.affine=null", "augment.border=reflect"],
            "border = reflect, and nothing moves images beyond their",
        ),
        (
            [
                "augment.affine={degrees: 0, translate: 0, scale: 0, shear: 0}",
                "augment.border=reflect",
            ],
            "nothing moves images beyond their edge",
        ),
        (
            ["augment.affine=null", "augment.ops=[vertical_flip]", "augment.border=mean"],
            "nothing moves images beyond",
        ),
        (["augment.mix_switch=0.3"], "chooses between mixup and cutmix, and not both are on"),
        (["augment.mixup=0", "augment.cutmix=1", "micro_batch=1"], "augment.cutmix = 1 mixes the"),
        (
            ["augment.ops=[{name: randaugment, magnitude: 12}]"],
            "magnitude 12 is above 10, timm's largest",
        ),
        (
            ["augment.ops=[{name: randaugment, convention: torchvision, std: 0.5}]"],
            "std and increasing are timm's; drop them",
        ),
        (
            ["augment.ops=[{name: randaugment, convention: torchvision, magnitude: 8.5}]"],
            "magnitude 8.5: torchvision's are whole; round it",
        ),
        (["augment.mixup=0", "loss={name: arcface}"], "set model.head={name: cosine, scale: 64}"),
        (
            ["augment.mixup=0", "loss={name: large_margin}", "model.head={name: cosine}"],
            "looks at the plain linear classifier, and model.head = cosine changes it",
        ),
        (
            ["regularise.drop_connect=0.1", "model.head={name: cosine}"],
            "hides weights of a plain linear classifier, and model.head = cosine is another",
        ),
        (
            ["augment.mixup=0.2", "augment.cutmix=1", "augment.mix_switch=1"],
            "leaves nothing to mixup; set augment.mixup to 0",
        ),
        (["loss={name: expected_cost, cost_vector: [0, 0]}"], "all costs are 0, and nothing would"),
        (
            [
                "model.init={head_prior: true}",
                "loss={class_weights: balanced}",
                "data.sampling=uniform",
            ],
            "class_weights = balanced evens the shares out",
        ),
        (
            ["model.init={head_prior: true}", "loss={name: hinge}", "data.sampling=uniform"],
            "loss = hinge takes margins",
        ),
        # Several parts at once: each is named.
        (["augment.jitter.hue=0.1", "data.lanes=3"], "data.lanes = 3 works with .* no colour"),
    ],
)
def test_what_cannot_train_is_refused_with_its_remedy(overrides: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        load_recipe("digits", overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        [*COLOUR, "augment.jitter={hue: 0.5, saturation: 1}"],
        ["augment.jitter={hue: 0, saturation: 0, brightness: 1}"],
        ["augment.crop={scale: [0.5, 0.5], ratio: [0.01, 100]}"],
        ["augment.affine={degrees: 180, shear: 89}"],
        ["augment.mean=[0]", "augment.std=[1]"],
        [*COLOUR, "augment.ops=[grayscale, hsv, pca, randaugment, erasing, pad_crop, cutout]"],
        ["augment.ops=[pad_crop]", "augment.border=reflect"],
        ["augment.affine={degrees: 5}", "augment.border=black"],
        ["augment.cutmix=1", "augment.mix_switch=0.3"],
        ["augment.ops=[{name: pca, eigenvalues: [0.1], eigenvectors: [[1]]}]"],
        ["augment.ops=[{name: randaugment, convention: torchvision, magnitude: 30}]"],
        ["augment.mixup=0", "loss={name: arcface}", "model.head={name: cosine, scale: 64}"],
        ["augment.mixup=0", "micro_batch=1"],
        ["model.options={drop_rate: 0, drop_block_rate: null, img_size: 32, global_pool: max}"],
        ["model.options={img_size: [32, 32]}"],
        ["data.train=all/train"],
        ["average={name: swa, start: 3 epochs, every: cycle}"],
        ["average={name: swa, start: 0 samples}", "optimizer={name: lbfgs, lr: 1}", "clip=null"],
    ],
)
def test_what_is_next_to_it_is_taken(overrides: list[str]) -> None:
    load_recipe("digits", overrides)


def test_a_list_of_operations_survives_a_round_trip() -> None:
    ops = "augment.ops=[invert, {name: randaugment, n: 3}, {name: erasing, fill: noise}]"
    recipe = load_recipe("digits", [ops])
    assert parse_recipe(recipe.model_dump(mode="json"), "again") == recipe
    assert [op.name for op in recipe.augment.ops] == ["invert", "randaugment", "erasing"]
    fewer = change_recipe(recipe, ["augment.ops=[invert]"])
    assert [op.name for op in fewer.augment.ops] == ["invert"]


def test_every_built_in_recipe_is_taken() -> None:
    for name in builtin_recipes():
        load_recipe(name)
