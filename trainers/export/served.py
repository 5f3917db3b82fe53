"""The whole way from pixels to probabilities as one network: what an exported file computes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bigbatch.configs.size import Size
from bigbatch.trainers.ensemble.combination import Combination
from bigbatch.trainers.export.combine import Combine
from bigbatch.trainers.export.preprocess import CentreCrop

INPUT = "pixels"


@dataclass(frozen=True)
class ServedMember:
    """A network, images [N, C, *image_size] to logits, and what its images are."""

    name: str
    network: nn.Module
    image_size: Size
    crop_fraction: float
    mean: tuple[float, ...]  # per channel, of pixels in [0, 1]
    std: tuple[float, ...]
    squash: bool = False
    scaling: tuple[Sequence[float], Sequence[float]] | None = None  # of numbers: mean and std

    @property
    def crop(self) -> tuple[Size, float, bool]:
        return self.image_size, self.crop_fraction, self.squash


class Served(nn.Module):
    """Pixels uint8 [N, H, W, C] -> probabilities float32 [N, classes], label int64 [N], and
    rejected bool [N] where the combination has a threshold. Of members that learned numbers:
    prediction float32 [N, K], the mean of theirs in the targets' own unit.

    Each member sees the images as its evaluation does; what members see alike is computed once.
    The networks are taken as they are and put into eval mode. Raises ValueError where members
    differ in channels, or are not as many as the combination is for.
    """

    mean: Tensor  # [looks, 1, C, 1, 1]
    std: Tensor
    target_mean: Tensor  # [M, 1, K] of members that give numbers
    target_std: Tensor

    def __init__(self, members: Sequence[ServedMember], combination: Combination) -> None:
        super().__init__()
        self.members = tuple(members)
        if len({len(member.mean) for member in members}) != 1:
            raise ValueError(f"members see {[len(m.mean) for m in members]} channels; one wanted")
        if combination.members not in (None, len(members)):
            raise ValueError(f"{len(members)} members; combined are {combination.members}")
        crops = dict.fromkeys(m.crop for m in members)
        looks = dict.fromkeys((m.crop, m.mean, m.std) for m in members)
        self._crop_of = [list(crops).index(look[0]) for look in looks]
        self._look_of = [list(looks).index((m.crop, m.mean, m.std)) for m in members]
        self.crops = nn.ModuleList(CentreCrop(*crop) for crop in crops)
        for name, values in (
            ("mean", [look[1] for look in looks]),
            ("std", [look[2] for look in looks]),
        ):
            self.register_buffer(name, torch.tensor(values)[:, None, :, None, None])
        self.networks = nn.ModuleList(member.network for member in members)
        self.combine = Combine(combination, len(members))
        self.gives_numbers = members[0].scaling is not None
        if self.gives_numbers:
            scalings = [member.scaling for member in members if member.scaling is not None]
            for place, name in enumerate(("target_mean", "target_std")):
                numbers = torch.tensor([list(scaling[place]) for scaling in scalings])
                self.register_buffer(name, numbers[:, None])
        self.reject_below = combination.reject_below
        self.eval()

    @property
    def outputs(self) -> tuple[str, ...]:
        if self.gives_numbers:
            return ("prediction",)
        names = ("probabilities", "label", "rejected")
        return names[:2] if self.reject_below is None else names

    @property
    def channels(self) -> int:
        return len(self.members[0].mean)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        crops = [crop(pixels) for crop in self.crops]
        looks = [
            crops[i].sub(mean).div(std)
            for i, mean, std in zip(self._crop_of, self.mean, self.std, strict=True)
        ]
        logits = [n(looks[i]).float() for i, n in zip(self._look_of, self.networks, strict=True)]
        if self.gives_numbers:
            return ((torch.stack(logits) * self.target_std + self.target_mean).mean(0),)
        probabilities = self.combine(torch.stack(logits))
        confidence, label = probabilities.max(1)
        if self.reject_below is None:
            return probabilities, label
        return probabilities, label, confidence < self.reject_below
