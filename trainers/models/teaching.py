"""Networks to learn by, at their papers' sizes and at small ones. Other libraries lack them."""

import math

from torch import Tensor, nn

from bigbatch.configs.size import Size, height_width

_SMALL = 64  # pixels below which ZFNet's first layers would leave nothing


class LeNet5(nn.Sequential):
    """LeCun et al. 1998, "Gradient-based learning applied to document recognition", section II.B.

    At 32 x 32 the paper's sizes: 6 maps of 28, 16 of 10, 120, 84. As is usual today, subsampling
    is a mean without weights, C3 sees all maps of S2, and the output is linear. Below 28 pixels
    the convolutions are padded, so that maps last. Images [B, in_chans, H, W] -> [B, num_classes].
    """

    def __init__(self, num_classes: int, in_chans: int = 1, image_size: Size = 32) -> None:
        sides = height_width(image_size)
        padding = 0 if min(sides) >= 28 else 2
        last = [((side - 4 + 2 * padding) // 2 - 4 + 2 * padding) // 2 for side in sides]
        super().__init__(
            nn.Conv2d(in_chans, 6, 5, padding=padding),
            nn.Tanh(),
            nn.AvgPool2d(2),
            nn.Conv2d(6, 16, 5, padding=padding),
            nn.Tanh(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * math.prod(last), 120),
            nn.Tanh(),
            nn.Linear(120, 84),
            nn.Tanh(),
            nn.Linear(84, num_classes),
        )


class ZFNet(nn.Sequential):
    """Zeiler and Fergus 2014, arXiv:1311.2901, figure 3: maps of 110, 55, 26, 13 and 6 at 224.

    Below 64 pixels the first two convolutions are 3 x 3 of stride 1, and poolings halve, rounded
    up. `hidden` is the width of the two layers before the last; theirs drop half in training.
    """

    def __init__(
        self, num_classes: int, in_chans: int = 3, image_size: Size = 224, hidden: int = 4096
    ) -> None:
        sides = height_width(image_size)
        last: list[int] = []
        small = min(sides) < _SMALL
        if small:
            first = nn.Conv2d(in_chans, 96, 3, padding=1), nn.Conv2d(96, 256, 3, padding=1)
            last = [math.ceil(side / 8) for side in sides]
        else:
            first = nn.Conv2d(in_chans, 96, 7, 2, padding=1), nn.Conv2d(96, 256, 5, 2)
            for side in sides:
                size = _pooled((side - 5) // 2 + 1)
                last.append((_pooled((size - 5) // 2 + 1) - 3) // 2 + 1)
        padding = 1 if small else 0
        super().__init__(
            first[0],
            nn.ReLU(),
            nn.MaxPool2d(3, 2, padding=1),
            nn.LocalResponseNorm(5, alpha=5e-4, k=2.0),
            first[1],
            nn.ReLU(),
            nn.MaxPool2d(3, 2, padding=1),
            nn.LocalResponseNorm(5, alpha=5e-4, k=2.0),
            nn.Conv2d(256, 384, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(384, 384, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, padding=padding),
            nn.Flatten(),
            nn.Linear(256 * math.prod(last), hidden),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(hidden, num_classes),
        )


def _pooled(size: int) -> int:
    """A map's size after max-pooling of 3 by stride 2, padded by 1."""
    return (size - 1) // 2 + 1


class NIN(nn.Sequential):
    """Network in network (Lin et al. 2014, arXiv:1312.4400), as its authors train it on CIFAR-10.

    The classifier is a convolution of 1 x 1 with a map for each class, whose mean is its logit;
    it has no ReLU behind it, by which a class could die. Sizes from 4 pixels.
    """

    def __init__(self, num_classes: int, in_chans: int = 3, image_size: Size = 32) -> None:
        super().__init__(
            *_mlpconv(in_chans, 192, 160, 96, kernel=5),
            nn.MaxPool2d(3, 2, padding=1),
            nn.Dropout(),
            *_mlpconv(96, 192, 192, 192, kernel=5),
            nn.AvgPool2d(3, 2, padding=1),
            nn.Dropout(),
            *_mlpconv(192, 192, 192, num_classes, kernel=3)[:-1],
            _GlobalMean(),
        )


def _mlpconv(inputs: int, *widths: int, kernel: int) -> list[nn.Module]:
    """A convolution, and a perceptron of two layers at each pixel behind it."""
    layers: list[nn.Module] = []
    for number, width in enumerate(widths):
        size = kernel if number == 0 else 1
        layers += [nn.Conv2d(inputs, width, size, padding=size // 2), nn.ReLU()]
        inputs = width
    return layers


class _GlobalMean(nn.Module):
    """[B, C, H, W] -> [B, C]."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps.mean((2, 3))


NETS = {"lenet5": LeNet5, "zfnet": ZFNet, "nin": NIN}
