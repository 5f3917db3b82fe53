"""What a recipe's model takes: parameters, optimizer state, activations. Started by preflight.

    python -m bigbatch.trainers.models.size CLASSES EPOCH_SAMPLES < recipe.json

Nothing is allocated: the model and one training step of one image are built on the meta
device. Prints JSON; bytes are those of one rank. Behind it, as "signal", is what
trainers/models/signal.py finds of the first step, of models that are not too large, and as
"rates" what learns at which rate, where that is not the same for all.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import to_json
from bigbatch.configs.model import Model
from bigbatch.configs.schema import Recipe
from bigbatch.configs.size import Size, height_width
from bigbatch.trainers.models.build import build_model
from bigbatch.trainers.models.convert import check_output, check_sizes, example_images
from bigbatch.trainers.models.signal import look
from bigbatch.trainers.optim import build_optimizer
from bigbatch.trainers.optim.stages import Learning, fit_transfer, freeze, rate_table, stages_of

_SAMPLES = 2  # BatchNorm wants more than one value per channel


def measure(recipe: Recipe, classes: int, epoch_samples: int = 1) -> dict[str, Any]:
    """Sizes of `recipe`'s model with `classes` outputs; no weights are made or loaded.

    activation_bytes is for one image: what autograd keeps for the backward pass, in the
    precision of the recipe. optimizer_bytes is counted from the state after a first step.
    """
    fresh = recipe.model.without_weights()
    with torch.device("meta"):
        model = build_model(
            fresh,
            classes=classes,
            channels=recipe.data.channels,
            seed=0,
            image_size=recipe.data.image_size,
        )
    others = [("evaluate.image_size", recipe.eval_size)]
    others.append(("data.progressive", recipe.data.smallest_size))
    check_sizes(model, recipe.data.channels, recipe.data.image_size, others, recipe.model.name)
    learning = fit_transfer(recipe, model, epoch_samples)
    freeze(model, learning)
    model.train()
    size = height_width(recipe.data.image_size)
    images = torch.empty(_SAMPLES, recipe.data.channels, *size, device="meta")
    try:
        kept = _saved_bytes(model, images) / _SAMPLES
    except Exception:  # whatever a model says of a size that it was not made for
        check_takes(fresh, classes, recipe.data.channels, recipe.data.image_size)
        raise
    if recipe.precision != "fp32":
        kept /= 2
    optimizer = build_optimizer(model, recipe.optimizer, learning)
    rates = _rates(recipe, model, learning, optimizer)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    states = [t for state in optimizer.state.values() for t in state.values()]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "weight_bytes": sum(_bytes(t) for t in model.state_dict().values()),
        "gradient_bytes": sum(map(_bytes, trained)),
        "optimizer_bytes": sum(_bytes(t) for t in states if isinstance(t, Tensor)),
        "activation_bytes": round(kept),
        "rates": rates,
    }


def check_takes(model: Model, classes: int, channels: int, image_size: Size) -> None:
    """Raise UserError where a network of fresh weights cannot take images of a size.

    To be asked once it has failed without values, which may be for want of those alone.
    """
    network = build_model(
        model, classes=classes, channels=channels, seed=0, image_size=image_size, quiet=True
    )
    check_output(network, example_images(network, channels, image_size), classes, model.name)


def _rates(
    recipe: Recipe, model: nn.Module, learning: Learning, optimizer: torch.optim.Optimizer
) -> list[dict[str, Any]]:
    """Rates by stage, where the recipe has several; [] where it has one for all."""
    own = recipe.optimizer
    if recipe.transfer is None:
        if own.layer_decay == 1.0 and not getattr(own, "weight_decay_of", {}):
            return []
        try:
            learning = Learning(tuple(stages_of(model)))
        except UserError:  # a model without a classifier: its stages are nobody's business here
            return []
    return rate_table(model, learning, optimizer, recipe.lr_scale)


def count_flops(model: nn.Module, channels: int, image_size: Size) -> int:
    """Those of a forward pass of one image by a network, counted while it makes one."""
    device = next(model.parameters()).device
    images = torch.zeros(_SAMPLES, channels, *height_width(image_size), device=device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images)
    return int(counter.get_total_flops()) // _SAMPLES


def _saved_bytes(model: nn.Module, images: Tensor) -> int:
    """Bytes that autograd keeps for the backward pass, each tensor counted once."""
    kept: dict[int, Tensor] = {}  # by storage; holding the tensors keeps the keys distinct

    def note(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss: Any = model(images).float().mean()
    del loss
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def _all(recipe: Recipe, classes: int, epoch_samples: int) -> dict[str, Any]:
    size = measure(recipe, classes, epoch_samples)
    try:
        found = look(recipe, classes, size["parameters"], size["activation_bytes"])
    except Exception as error:  # sizes are known all the same
        text = str(error).strip().partition("\n")[0]
        found = {"state": "skipped", "text": text or type(error).__name__, "layers": []}
    return {**size, "signal": found}


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


if __name__ == "__main__":
    try:
        given = Recipe.model_validate_json(sys.stdin.read())
        print(to_json(_all(given, int(sys.argv[1]), int(sys.argv[2]))))
    except UserError as wrong:
        print(wrong, file=sys.stderr)
        sys.exit(2)
