"""Model FLOPs of an image, and how many a device can do: the two halves of MFU.

Model FLOPs utilisation (Chowdhery et al. 2022, arXiv:2204.02311, appendix B): the FLOPs
that the model itself needs a second, over the device's peak. Recomputation, augmentation
and the optimizer are work, but not the model's.
"""

import re
from functools import cache

import torch

from bigbatch.configs.errors import UserError
from bigbatch.configs.model import Model
from bigbatch.configs.schema import Recipe
from bigbatch.configs.size import Size
from bigbatch.trainers.models.build import build_model
from bigbatch.trainers.models.size import check_takes, count_flops

# Dense peaks in TFLOP/s, without sparsity, fp32 accumulation. fp32 is the CUDA cores' rate,
# tf32, bf16 and fp16 are the tensor cores'. From the makers' datasheets, by device name as
# torch.cuda.get_device_name gives it; the first pattern that is found counts.
PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    # NVIDIA HGX B200 datasheet (2024), per GPU
    (r"\bB200\b", {"fp32": 75, "tf32": 1125, "bf16": 2250, "fp16": 2250}),
    # NVIDIA H200 datasheet (2024)
    (r"\bG?H200\b", {"fp32": 67, "tf32": 494.7, "bf16": 989.4, "fp16": 989.4}),
    # NVIDIA H100 datasheet (2023): PCIe, NVL, SXM
    (r"\bH100 PCIe\b", {"fp32": 51, "tf32": 378, "bf16": 756, "fp16": 756}),
    (r"\bH100 NVL\b", {"fp32": 60, "tf32": 417.5, "bf16": 835.5, "fp16": 835.5}),
    (r"\bH100\b", {"fp32": 67, "tf32": 494.7, "bf16": 989.4, "fp16": 989.4}),
    # NVIDIA A100 datasheet (2021)
    (r"\bA100\b", {"fp32": 19.5, "tf32": 156, "bf16": 312, "fp16": 312}),
    # NVIDIA A40, A30, A10 datasheets (2021)
    (r"\bA40\b", {"fp32": 37.4, "tf32": 74.8, "bf16": 149.7, "fp16": 149.7}),
    (r"\bA30\b", {"fp32": 10.3, "tf32": 82, "bf16": 165, "fp16": 165}),
    (r"\bA10\b", {"fp32": 31.2, "tf32": 62.5, "bf16": 125, "fp16": 125}),
    # NVIDIA L40S and L4 datasheets (2023); those figures are with sparsity, halved here
    (r"\bL40S\b", {"fp32": 91.6, "tf32": 183, "bf16": 362, "fp16": 362}),
    (r"\bL4\b", {"fp32": 30.3, "tf32": 60, "bf16": 121, "fp16": 121}),
    # NVIDIA V100 datasheet (2020): PCIe, SXM2. No bf16 and no TF32.
    (r"\bV100-PCIE\b", {"fp32": 14, "fp16": 112}),
    (r"\bV100\b", {"fp32": 15.7, "fp16": 125}),
    # NVIDIA T4 datasheet (2019)
    (r"\bT4\b", {"fp32": 8.1, "fp16": 65}),
    # AMD Instinct MI300X datasheet (2023)
    (r"\bMI300X\b", {"fp32": 163.4, "tf32": 653.7, "bf16": 1307.4, "fp16": 1307.4}),
)


def flops_per_image(recipe: Recipe, classes: int) -> int | None:
    """Floating-point operations of forward and backward pass for one training image.

    The backward pass counts twice the forward pass, as is usual: torch's own count of it takes a
    grouped convolution for a full one (EfficientNet-B0: 32 GFLOPs instead of 2.3). SAM makes
    both passes twice, loss jsd for three views.
    """
    forward = forward_flops(recipe, classes, recipe.data.image_size)
    passes = 1 if recipe.regularise.sharpness is None else 2
    return None if forward is None else 3 * passes * recipe.views * forward


def forward_flops(recipe: Recipe, classes: int, size: Size) -> int | None:
    """Floating-point operations of the forward pass for one image of this size.

    A multiplication and its addition count as two. Counted by torch, on a model that has shapes
    and no values, so nothing is computed. None for a model that cannot run without values. Raises
    UserError where it cannot take such images at all.
    """
    model = recipe.model.without_weights().model_dump_json()
    return _counted(model, classes, recipe.data.channels, recipe.data.image_size, size)


@cache
def _counted(model: str, classes: int, channels: int, built: Size, size: Size) -> int | None:
    """Once in a process, whose next attempt, after a rollback, has the same model: counting takes
    as long as ten steps of a small network."""
    config = Model.model_validate_json(model)
    try:
        with torch.device("meta"):
            network = build_model(
                config, classes=classes, channels=channels, seed=0, image_size=built
            )
            return count_flops(network, channels, size)
    except UserError:
        raise
    except Exception:  # for want of values, or since it takes no images of this size
        if not config.beyond_timm():  # others have shown it when they were built
            check_takes(config, classes, channels, size)
        return None


def peak_flops(device: torch.device, precision: str) -> float | None:
    """What one device can do, in FLOP/s; None where no datasheet says: a CPU, for one."""
    if device.type != "cuda":
        return None
    # torch multiplies float32 on tensor cores where this is allowed, and convolves by default.
    tf32 = precision == "fp32" and torch.backends.cudnn.allow_tf32
    return peak_of(torch.cuda.get_device_name(device), precision, tf32)


def peak_of(name: str, precision: str, tf32: bool = False) -> float | None:
    """The peak of a device by its name, in FLOP/s."""
    for pattern, peaks in PEAKS:
        if re.search(pattern, name):
            peak = (peaks.get("tf32") if tf32 else None) or peaks.get(precision)
            return peak * 1e12 if peak else None
    return None
