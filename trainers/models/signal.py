"""How a fresh network passes signal forward and gradients back, layer by layer, at its first step.

He et al. 2015 (arXiv:1502.01852, section 2.2): each layer multiplies the variance of what goes
through it by a factor, and a product of many such factors vanishes or explodes.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from bigbatch.configs.schema import Recipe
from bigbatch.configs.size import height_width
from bigbatch.configs.targets import learns_numbers
from bigbatch.data.rng import key64
from bigbatch.trainers.models.build import build_model

_IMAGES = 8  # at most; the smallest number that a norm of a few images bears
_MOST_PARAMETERS = 150_000_000  # a login node has other users, too
_MOST_BYTES = 4_000_000_000
# A gradient's energy at the first layer over that at the last. Networks that train well have
# 1e-2 to 1e3 here (ResNet, VGG, MobileNet, ViT, DenseNet), AlexNet's and NIN's old schemes 1e-5
# to 1e-6; twenty layers of ReLU by Xavier's have 2e-9, by torch's own default 1e-19.
_VANISHED, _EXPLODED = 1e-8, 1e6
_LARGEST, _SMALLEST = 1e8, 1e-12  # variance of any layer's outputs, over images of variance 1


@dataclass
class LayerSignal:
    """A convolution or linear layer, in the order of the forward pass.

    `forward` is the variance of its outputs, `backward` the mean square of the gradient at them,
    `energy` that gradient's sum of squares for an image, which a change of size leaves comparable.
    """

    name: str
    forward: float
    backward: float = 0.0
    energy: float = 0.0


def measure(model: nn.Module, images: Tensor, wanted: Tensor) -> list[LayerSignal]:
    """One forward and backward pass of the sum of losses, in training mode.

    Images [B, C, H, W]; wanted are labels int64 [B], for cross-entropy, or numbers [B, K], for half
    the squared errors. Gradients are left in the model.
    """
    found: list[LayerSignal] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            seen = LayerSignal(name, output.detach().double().var(correction=0).item())
            found.append(seen)

            def back(gradient: Tensor) -> None:
                squares = gradient.double().square()
                seen.backward += squares.mean().item()
                seen.energy += squares.sum().item() / len(images)

            if output.requires_grad:
                output.register_hook(back)

        return hook

    handles = [
        module.register_forward_hook(watch(name))
        for name, module in model.named_modules()
        if isinstance(module, _ConvNd | nn.Linear)
    ]
    outputs = model.train()(images)
    if wanted.is_floating_point():
        (0.5 * (outputs - wanted).square().sum()).backward()
    else:
        F.cross_entropy(outputs, wanted, reduction="sum").backward()
    for handle in handles:
        handle.remove()
    return found


def judge(layers: list[LayerSignal]) -> tuple[str, str]:
    """(state, text) of a finding: ok, or a warning of signal that vanishes or explodes."""
    if not layers:
        return "skipped", "the model has neither convolutions nor linear layers"
    remedy = "set model.init (docs/craft.md), or take a model with norms"
    span = f"{layers[0].forward:.3g} after {layers[0].name}, {layers[-1].forward:.3g} at the end"
    largest = max(layers, key=lambda layer: _finite(layer.forward))
    smallest = min(layers, key=lambda layer: layer.forward)
    if _finite(largest.forward) > _LARGEST:
        why = f"the signal explodes: variance {largest.forward:.3g} after {largest.name}"
        return "warning", f"{why}; {remedy}"
    if smallest.forward < _SMALLEST and smallest is not layers[-1]:  # a head may start at 0
        why = f"the signal vanishes: variance {smallest.forward:.3g} after {smallest.name}"
        return "warning", f"{why}; {remedy}"
    reached = [layer for layer in layers if layer.energy > 0]
    if not reached:
        return "ok", f"variance {span}; no gradient yet: the classifier starts at 0"
    ratio = _finite(reached[0].energy) / reached[-1].energy
    text = f"gradients at {reached[0].name} have {ratio:.2g} of the energy at {reached[-1].name}"
    if ratio < _VANISHED:
        return "warning", f"gradients vanish: {text}; {remedy}"
    if ratio > _EXPLODED:
        return "warning", f"gradients explode: {text}; {remedy}"
    still = len(layers) - len(reached)
    closed = f"; {still} layers get no gradient at first, behind norms that start at 0"
    return "ok", f"variance {span}; {text}{closed if still else ''}"


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def look(recipe: Recipe, classes: int, parameters: int, activation_bytes: int) -> dict[str, Any]:
    """The finding of a recipe's model over synthetic images, and its layers.

    Images are Gaussian of variance 1, as normalised ones are, labels are any. `activation_bytes`
    are for one image. Nothing is measured of weights that are loaded, or would take much memory.
    """
    count = max(2, min(_IMAGES, recipe.micro_batch))
    if recipe.model.pretrained or recipe.model.checkpoint:
        return {"state": "skipped", "text": "weights are loaded, not drawn", "layers": []}
    if parameters > _MOST_PARAMETERS or count * activation_bytes > _MOST_BYTES:
        return {"state": "skipped", "text": "the model is too large to try here", "layers": []}
    model = build_model(
        recipe.model.model_copy(update={"recompute": False}),  # hooks would see each layer twice
        classes=classes,
        channels=recipe.data.channels,
        seed=recipe.seed,
        image_size=recipe.data.image_size,
        head_prior=torch.zeros(classes),
    )
    generator = torch.Generator().manual_seed(key64(recipe.seed, "signal"))
    size = count, recipe.data.channels, *height_width(recipe.data.image_size)
    images = torch.randn(size, generator=generator)
    if learns_numbers(recipe):  # standardised ones
        wanted = torch.randn((count, classes), generator=generator)
    else:
        wanted = torch.randint(classes, (count,), generator=generator)
    torch.manual_seed(key64(recipe.seed, "signal", "model"))  # dropout
    layers = measure(model, images, wanted)
    state, text = judge(layers)
    return {"state": state, "text": text, "layers": [asdict(layer) for layer in layers]}
