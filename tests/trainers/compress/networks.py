"""Small networks with random weights, norms included."""

import timm
import torch
from torch import Tensor, nn


def network(name: str = "test_resnet", channels: int = 1, seed: int = 0) -> nn.Module:
    """A timm network of ten classes in eval mode."""
    torch.manual_seed(seed)
    model: nn.Module = timm.create_model(name, num_classes=10, in_chans=channels)
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(std=0.1, generator=generator)
            layer.weight.data.uniform_(0.5, 1.5, generator=generator)  # timm has some of them 0
    return model.eval()


def batch(
    count: int = 4, channels: int = 1, size: int = 32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Images [B, C, size, size], and labels."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, channels, size, size, generator=generator)
    return images, torch.arange(count) % 10


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in before)
