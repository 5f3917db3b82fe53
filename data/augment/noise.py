"""Noise on a device: a number for every pixel that its key alone decides.

Bits are hashed in integers, the same on every device; drawing them on the host would take
longer than a training step of a GPU.
"""

import math

import torch
from torch import Tensor

# Wellons's hash-prospector: of two rounds and shifts 16, 15, 15 the least biased one found.
_APART = 0x3C6EF372  # so that equal halves of a key give no equal halves of a pair
_MIX = (0x21F0AAAD, 0xD35A2D97 - (1 << 32))


def normals(keys: Tensor, shape: torch.Size) -> Tensor:
    """Normal numbers of mean 0 and std 1, float32 `shape` [B, ...], from keys [B, 2] of int32.

    Box and Muller's method on a hash of the pixel's number: pixel 2k takes the cosine of pair
    k, pixel 2k + 1 its sine.
    """
    count = math.prod(shape[1:])
    pairs = torch.arange(-(-count // 2), dtype=torch.int32, device=keys.device)
    one, other = keys.unsqueeze(2).unbind(1)  # each [B, 1]
    radius = _uniform(pairs, one, other).log_().mul_(-2).sqrt_()
    angle = _uniform(pairs, other, one + _APART).mul_(2 * math.pi)
    found = torch.stack([angle.cos().mul_(radius), angle.sin_().mul_(radius)], 2)
    return found.view(len(keys), -1)[:, :count].view(shape)


def _uniform(numbers: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """In (0, 1), [B, N], for numbers [N] and keys [B, 1]: 24 bits of the hash and a half."""
    bits = _hash(_hash(numbers ^ one).add_(other))
    return _shifted(bits, 8).float().add_(0.5).mul_(2.0**-24)


def _hash(x: Tensor) -> Tensor:
    """A bijection of int32 whose bits look random; products wrap around."""
    x = (x ^ _shifted(x, 16)).mul_(_MIX[0])
    x = x.bitwise_xor_(_shifted(x, 15)).mul_(_MIX[1])
    return x.bitwise_xor_(_shifted(x, 15))


def _shifted(x: Tensor, by: int) -> Tensor:
    """To the right without the sign."""
    return (x >> by).bitwise_and_((1 << (32 - by)) - 1)
