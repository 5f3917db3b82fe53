"""Networks of tests' own, small enough that a whole run of one takes seconds."""

from torch import nn


def convolutions(
    num_classes: int,
    in_chans: int,
    *,
    depth: int = 2,
    width: int = 32,
    norm: bool = True,
    dropout: float = 0.0,
) -> nn.Module:
    """`depth` convolutions with ReLU, each but the first two of equal size, and a classifier."""
    layers: list[nn.Module] = []
    for i in range(depth):
        layers.append(nn.Conv2d(width if i else in_chans, width, 3, 2 if i < 2 else 1, 1))
        layers += [nn.BatchNorm2d(width)] if norm else []
        layers.append(nn.ReLU())
        layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, num_classes)
    )


def coarse(num_classes: int, in_chans: int) -> nn.Module:
    """A linear classifier of an image's quarters, of which it sees the mean brightness alone."""
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * in_chans, num_classes)
    )
