"""Layers that drop weights or add noise in training, and weights kept within a norm.

What is random is drawn in the forward pass, from the stream that the loop seeds for each
micro-batch, as dropout is: the same on any number of ranks. Names of weights stay as they are, so
that what trained with these loads anywhere without.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigbatch.configs.errors import UserError
from bigbatch.configs.regularise import Regularise
from bigbatch.trainers.optim.groups import linear_classifier, named_parameters


class DropConnectLinear(nn.Linear):
    """A linear layer whose weights and biases drop out, one by one, in training.

    Wan et al. 2013, "Regularization of neural networks using DropConnect", section 3. What stays
    is divided by its share, so that the mean is the plain layer, which evaluation takes; one mask
    serves the images of a micro-batch, where theirs is drawn for each. It is not the drop path
    that timm calls drop_connect.
    """

    rate: float

    def forward(self, x: Tensor) -> Tensor:
        weight = F.dropout(self.weight, self.rate, self.training)
        bias = None if self.bias is None else F.dropout(self.bias, self.rate, self.training)
        return F.linear(x, weight, bias)


def regularise(model: nn.Module, config: Regularise) -> None:
    """Change the classifier of `model` as the recipe asks. UserError where it cannot be."""
    if config.drop_connect:
        _, head = linear_classifier(model, "regularise.drop_connect")
        if type(head) is not nn.Linear:
            raise UserError(
                "regularise.drop_connect is for a plain linear classifier, and this model's is a "
                f"{type(head).__name__}; set it to 0"
            )
        head.__class__ = DropConnectLinear
        head.rate = config.drop_connect  # type: ignore[assignment]
    if config.input_noise:
        std = config.input_noise
        _, head = linear_classifier(model, "regularise.input_noise")
        head.register_forward_pre_hook(lambda layer, inputs: _noisy(layer, inputs[0], std))


def _noisy(layer: nn.Module, x: Tensor, std: float) -> Tensor:
    return x + std * torch.randn_like(x) if layer.training else x


def keep_within(optimizer: torch.optim.Optimizer, model: nn.Module, limit: float) -> None:
    """After each of the optimizer's steps, scale weights down to `limit`, unit by unit.

    Srivastava et al. 2014, "Dropout", section 5.1: the L2 norm of the weights into each neuron or
    output channel. Those of linear layers and convolutions that decay; biases do not count.
    """
    plain = {p for _, p, is_plain in named_parameters(model) if is_plain}
    kinds = nn.Linear | nn.modules.conv._ConvNd
    weights = {m.weight for m in model.modules() if isinstance(m, kinds)}
    bound = [w for w in weights - plain if w.requires_grad]

    def constrain(*step: Any) -> None:
        learning = {p for group in optimizer.param_groups for p in group["params"]}
        with torch.no_grad():
            for weight in filter(learning.__contains__, bound):  # not one that waits to learn
                units = tuple(range(1, weight.ndim))
                norm = torch.linalg.vector_norm(weight, dim=units, keepdim=True)
                weight.mul_((limit / norm).clamp(max=1.0))  # norm 0: infinity, so 1

    optimizer.register_step_post_hook(constrain)
