"""Weights that `bigbatch compress` wrote, and the network of their model's name made to fit them.

The tensors alone say what was changed, so that nothing has to be kept beside them:

structured: tensors of fewer channels.
lowrank: `X.0.weight` and `X.1.weight`, a pair of layers in place of layer X (`factor_pair`).
codebook: `X.codebook` and `X.indices` in place of tensor X (`pack`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bigbatch.configs.errors import UserError
from bigbatch.trainers.models.seal import check_seal
from bigbatch.trainers.models.weights_file import COMPRESSION, read_header

CODEBOOK, INDICES = ".codebook", ".indices"


def compression_of(path: Path) -> str | None:
    """The method by which weights came to be no plain ones of their model's name.

    None for plain ones, and for what cannot be read.
    """
    try:
        return read_header(path).metadata.get(COMPRESSION)
    except (OSError, ValueError):
        return None


def load_compressed(model: nn.Module, path: Path) -> None:
    """Change `model`, as its name gives it, to the network of a file, weights included.

    Raises UserError where they cannot be loaded, or would not fit.
    """
    try:
        stored = load_file(path)
        check_seal(path, stored)
        tensors = decode(stored, model)
        reshape(model, tensors)
        model.load_state_dict(tensors)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be loaded: {error}; restore it from a backup, or make it again with "
            "`bigbatch compress`"
        ) from None


def reshape(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Make the layers of `model` as large as `tensors`, in place; their values are left open.

    Raises ValueError where a tensor has another number of dimensions than the model's.
    """
    for name, layer in list(model.named_modules()):
        factors = f"{name}.0.weight", f"{name}.1.weight"
        if all(key in tensors for key in factors) and isinstance(layer, nn.Conv2d | nn.Linear):
            model.set_submodule(name, factor_pair(layer, tensors[factors[0]].shape[0]))
    for name, module in model.named_modules():
        _resize(module, f"{name}." if name else "", tensors)


def factor_pair(layer: nn.Conv2d | nn.Linear, rank: int) -> nn.Sequential:
    """Layers that compute what `layer` does where its weight, as a matrix, has this rank.

    The first has `rank` outputs and the layer's kernel, the second the layer's outputs and bias.
    """
    like: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        return nn.Sequential(
            nn.Linear(layer.in_features, rank, bias=False, **like),
            nn.Linear(rank, layer.out_features, bias=bias, **like),
        )
    first = nn.Conv2d(
        layer.in_channels,
        rank,
        layer.kernel_size,  # type: ignore[arg-type]  # a pair, as every Conv2d has it
        layer.stride,  # type: ignore[arg-type]
        layer.padding,  # type: ignore[arg-type]
        layer.dilation,  # type: ignore[arg-type]
        bias=False,
        padding_mode=layer.padding_mode,
        **like,
    )
    return nn.Sequential(first, nn.Conv2d(rank, layer.out_channels, 1, bias=bias, **like))


def _resize(module: nn.Module, prefix: str, tensors: Mapping[str, Tensor]) -> None:
    changed = False
    for key, old in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        new = tensors.get(prefix + key)
        if new is None or new.shape == old.shape:
            continue
        if new.ndim != old.ndim:
            shapes = list(new.shape), list(old.shape)
            raise ValueError(f"{prefix}{key} has shape {shapes[0]}, the model's {shapes[1]}")
        empty = old.new_empty(new.shape)
        if isinstance(old, nn.Parameter):
            setattr(module, key, nn.Parameter(empty, requires_grad=old.requires_grad))
        else:
            setattr(module, key, empty)
        changed = True
    if changed:
        _note_sizes(module)


def _note_sizes(module: nn.Module) -> None:
    """Tell a layer how large its tensors have become."""
    match module:
        case nn.Conv2d():
            if module.groups == module.in_channels == module.out_channels:  # depthwise
                module.groups = module.weight.shape[0]
            module.out_channels = module.weight.shape[0]
            module.in_channels = module.weight.shape[1] * module.groups
        case nn.Linear():
            module.out_features, module.in_features = module.weight.shape
        case _BatchNorm():
            assert module.running_mean is not None
            module.num_features = len(module.running_mean)
        case nn.LayerNorm():
            module.normalized_shape = tuple(module.weight.shape)
        case nn.GroupNorm():
            module.num_channels = len(module.weight)


def pack(indices: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Numbers [N] below 2^bits, one after another without a gap: ceil(N bits / 8) bytes."""
    each = np.unpackbits(indices[:, None], axis=1)[:, 8 - bits :]
    return np.packbits(each)


def unpack(packed: npt.NDArray[np.uint8], bits: int, count: int) -> npt.NDArray[np.uint8]:
    """The inverse of `pack` for `count` numbers. ValueError where `packed` has other bytes."""
    if len(packed) != -(-count * bits // 8):
        raise ValueError(f"{len(packed):,} bytes of indices for {count:,} weights of {bits} bits")
    each = np.unpackbits(packed, count=count * bits).reshape(count, bits)
    return np.packbits(np.pad(each, ((0, 0), (8 - bits, 0))), axis=1)[:, 0]


def decode(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Tensors by name, those of codebooks put together again; shapes are the model's.

    Raises ValueError where a codebook and its indices do not fit.
    """
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    plain = dict(tensors)
    for key in [key for key in tensors if key.endswith(CODEBOOK)]:
        name = key.removesuffix(CODEBOOK)
        book, packed = plain.pop(key), plain.pop(name + INDICES, None)
        bits = len(book).bit_length() - 1
        if packed is None or name not in shapes or not 1 <= bits <= 8 or len(book) != 1 << bits:
            raise ValueError(f"{key} of {len(book):,} entries belongs to no tensor of the model")
        indices = unpack(packed.numpy(), bits, shapes[name].numel())
        plain[name] = book[torch.from_numpy(indices).long()].reshape(shapes[name])
    return plain
