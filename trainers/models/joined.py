"""Several networks side by side, and one linear layer that classifies by all their features."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bigbatch.configs.model import Model
from bigbatch.configs.size import Size
from bigbatch.trainers.models.build import build_model
from bigbatch.trainers.optim.groups import linear_classifier

NAME = f"{__name__}:Joined"  # as a recipe's model.name says it
WHY = "joining features"


class Joined(nn.Module):
    """Images [B, C, H, W] to logits [B, classes], by way of features [B, D1 + D2 + ...].

    The features of a network are what its classifier takes, in the order of `members`.
    """

    def __init__(
        self,
        num_classes: int,
        in_chans: int,
        members: Sequence[dict[str, Any]],
        image_size: Size | None = None,
    ) -> None:
        """`members` are networks as recipes write them (`Model.network`), of this size of images.

        Raises UserError where one has no one linear classifier.
        """
        super().__init__()
        networks = [
            build_model(
                Model.model_validate(tree),
                classes=num_classes,
                channels=in_chans,
                seed=0,
                image_size=image_size,
            )
            for tree in members
        ]
        self.widths = [_behead(network) for network in networks]
        self.networks = nn.ModuleList(networks)
        self.head = nn.Linear(sum(self.widths), num_classes)

    def get_classifier(self) -> nn.Linear:
        return self.head

    def forward(self, images: Tensor) -> Tensor:
        features = [network(images).flatten(1) for network in self.networks]
        logits: Tensor = self.head(torch.cat(features, 1))
        return logits


def _behead(network: nn.Module) -> int:
    """Let a network give its features; returns how many they are."""
    path, head = linear_classifier(network, WHY)
    network.set_submodule(path, nn.Identity())
    return head.in_features


def join(members: Sequence[nn.Module], into: Joined, weight: Tensor, bias: Tensor) -> None:
    """Give `into` the weights of trained networks, and those of the head [C, D] and [C]."""
    for network, member in zip(into.networks, members, strict=True):
        path, _ = linear_classifier(member, WHY)
        state = {k: v for k, v in member.state_dict().items() if not k.startswith(f"{path}.")}
        network.load_state_dict(state)
    with torch.no_grad():
        into.head.weight.copy_(weight)
        into.head.bias.copy_(bias)
