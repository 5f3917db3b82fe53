"""CPU time of augmenting an image: bigbatch beside torchvision v2, kornia and timm.

    python benchmarks/augment.py [--quick] [--json FILE]

Standard: random resized crop, flip, jitter of brightness, contrast and saturation, erasing,
normalisation and mixup, of uint8 images of 256 x 256 to batches of 64 at 224. RandAugment: two
operations at 9/10 of timm's range, each with probability 1/2, on images of 224. torchvision (v2)
takes a batch and draws one set of parameters for all its images; kornia's modules take batches
and draw for each image; timm's pipeline is Pillow, image by image, with mixup of the batch;
bigbatch draws for each image. The contestants take turns, each on one thread, and each round
has other draws. CPU time, since the machine has other work; each ratio is the median of the
ratios within a round.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import kornia.augmentation as kornia
import numpy as np
import timm.data
import torch
from machine import benchmark_parser, machine, write_figures
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torchvision.transforms import v2

from bigbatch.configs import augment_ops as ops
from bigbatch.configs.augment import Augment, Crop, Jitter
from bigbatch.data.augment.pipeline import Augmenter
from bigbatch.data.batch import MicroBatch

BATCH, SOURCE, OUT, CLASSES = 64, 256, 224, 1000
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SCALE, STRENGTH, ERASED, ALPHA = (0.08, 1.0), 0.4, 0.25, 0.2
Contestant = Callable[[int], Any]  # round -> what it made, or what is to be timed


def pictures(side: int) -> np.ndarray:
    """[BATCH, side, side, 3] uint8: smooth shapes with some noise, as photographs have."""
    generator = np.random.default_rng(0)
    coarse = torch.from_numpy(generator.random((BATCH, 3, 9, 9), np.float32))
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")
    noisy = smooth.permute(0, 2, 3, 1).numpy() + generator.normal(0, 0.03, (BATCH, side, side, 3))
    return (noisy.clip(0, 1) * 255).astype(np.uint8)


def augmenter(augment: Augment) -> Augmenter:
    device = torch.device("cpu")
    return Augmenter(
        augment, image_size=OUT, crop_fraction=1.0, classes=CLASSES, seed=0, device=device
    )


def micro_batch(images: np.ndarray, step: int) -> MicroBatch:
    count, side = images.shape[:2]
    return MicroBatch(
        step=step,
        index=0,
        samples=np.arange(count),
        labels=torch.arange(count),
        pixels=torch.from_numpy(images.reshape(-1)),
        sizes=torch.full((count, 2), side, dtype=torch.int32),
        channels=3,
    )


def standard() -> dict[str, Contestant]:
    images = pictures(SOURCE)
    ours = augmenter(
        Augment(
            crop=Crop(scale=SCALE),
            flip=0.5,
            jitter=Jitter(brightness=STRENGTH, contrast=STRENGTH, saturation=STRENGTH),
            ops=[ops.Erasing(name="erasing", p=ERASED)],
            mixup=ALPHA,
            mean=list(MEAN),
            std=list(STD),
        )
    )
    tensors, labels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.arange(BATCH)
    jitter = (STRENGTH, STRENGTH, STRENGTH)
    batched = v2.Compose(
        [
            v2.RandomResizedCrop(OUT, SCALE, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(*jitter),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
            v2.RandomErasing(ERASED),
        ]
    )
    mixed = v2.MixUp(alpha=ALPHA, num_classes=CLASSES)
    modules = kornia.AugmentationSequential(
        kornia.RandomResizedCrop((OUT, OUT), SCALE),
        kornia.RandomHorizontalFlip(),
        kornia.ColorJitter(*jitter),
        kornia.RandomErasing(p=ERASED),
        kornia.Normalize(MEAN, STD),
        data_keys=["input"],
    )
    kornia_mixed = kornia.RandomMixUpV2(lambda_val=(0.0, 1.0), data_keys=["input", "class"])
    pillow = [Image.fromarray(image) for image in images]
    single = timm.data.create_transform(
        OUT,
        is_training=True,
        scale=SCALE,
        color_jitter=STRENGTH,
        interpolation="bilinear",
        re_prob=ERASED,
        mean=MEAN,
        std=STD,
    )
    timm_mixed = timm.data.Mixup(mixup_alpha=ALPHA, num_classes=CLASSES, label_smoothing=0.0)

    def with_kornia(_: int) -> object:
        return kornia_mixed(modules(tensors.float().div_(255)), labels)

    def with_timm(_: int) -> object:
        return _timm_mixup(timm_mixed, torch.stack([single(image) for image in pillow]), labels)

    return {
        "bigbatch": lambda step: ours.train(micro_batch(images, step)),
        "torchvision v2, batched": lambda _: mixed(batched(tensors), labels),
        "kornia modules": with_kornia,
        "timm, per image": with_timm,
    }


def _timm_mixup(mixup: timm.data.Mixup, images: torch.Tensor, labels: torch.Tensor) -> object:
    """timm makes its targets on a GPU unless it is told otherwise, which its call is not."""
    weight = mixup._mix_batch(images)
    return images, timm.data.mixup.mixup_target(labels, CLASSES, weight, 0.0)


def rand_augment() -> dict[str, Contestant]:
    images = pictures(OUT)
    ours = augmenter(
        Augment(ops=[ops.RandAugment(name="randaugment", std=0)], mean=list(MEAN), std=list(STD))
    )
    floats = torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(255).contiguous()
    fill = {"img_mean": tuple(round(255 * m) for m in MEAN), "translate_const": 100}
    pillow = [Image.fromarray(image) for image in images]
    theirs = rand_augment_transform("rand-m9-n2-inc1", fill)
    bilinear = rand_augment_transform(
        "rand-m9-n2-inc1", {**fill, "interpolation": Image.Resampling.BILINEAR}
    )
    ((operation, _),) = ours._operations

    def with_bigbatch(step: int) -> object:
        draws = ours._draws(micro_batch(images, step), operation.name, 0)
        fresh = floats.clone()  # it overwrites what it is given, in training fresh crops
        return lambda: operation.apply(fresh, draws)

    def with_torchvision(_: int) -> object:
        one = v2.RandAugment(2, 27, interpolation=v2.InterpolationMode.BILINEAR)
        return [one(image) for image in torch.from_numpy(images).permute(0, 3, 1, 2)]

    return {
        "bigbatch": with_bigbatch,
        "timm, per image": lambda _: [theirs(image) for image in pillow],
        "timm, per image, bilinear": lambda _: [bilinear(image) for image in pillow],
        "torchvision v2, per image, each done": with_torchvision,
    }


def measure(contestants: dict[str, Contestant], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of CPU time an image, a figure for each round."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for step in range(-1, rounds):
        for name, run in contestants.items():
            started = time.process_time()
            made = run(step + 1)
            if callable(made):
                started = time.process_time()
                made()
            if step >= 0:
                found[name].append((time.process_time() - started) * 1e3 / BATCH)
    return found


def table(title: str, found: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    print(f"{title:40}{'ms/image':>9}{'times bigbatch':>16}")
    figures = {}
    for name, times in found.items():
        ratio = statistics.median(t / o for t, o in zip(times, found["bigbatch"], strict=True))
        figures[name] = {
            "ms_per_image": round(statistics.median(times), 3),
            "times_bigbatch": round(ratio, 2),
        }
        print(f"{name:40}{figures[name]['ms_per_image']:9.3f}{ratio:16.2f}")
    return figures


def main() -> None:
    parser = benchmark_parser(__doc__, quick="2 rounds instead of 30")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rounds = 2 if options.quick else 30
    figures = {
        "standard": table("standard", measure(standard(), rounds)),
        "randaugment": table("RandAugment", measure(rand_augment(), rounds)),
    }
    packages = ("bigbatch", "kornia", "numpy", "pillow", "timm", "torch", "torchvision")
    write_figures(options.json, machine=machine(*packages, rounds=rounds), figures=figures)


if __name__ == "__main__":
    main()
