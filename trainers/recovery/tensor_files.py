"""Files of tensors: written and read as safetensors, and put onto the disk."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import to_json
from bigbatch.trainers.losses.centres import is_centre
from bigbatch.trainers.models.seal import check_seal, sealed
from bigbatch.trainers.models.weights_file import METADATA, WeightsInfo, to_metadata

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def save_weights(model: nn.Module, path: Path, info: WeightsInfo | None = None) -> None:
    """The model's weights under timm's own names: `timm.create_model(checkpoint_path=...)`."""
    weights = {name: t for name, t in model.state_dict().items() if not is_centre(name)}
    write_tensors(path, copy_to_cpu(weights, {}), info)


def write_tensors(
    path: Path, tensors: dict[str, Tensor], info: WeightsInfo | None = None
) -> dict[str, int | str]:
    """Write contiguous CPU tensors as safetensors and put them onto the disk.

    `info` goes into the header as metadata, under a seal, which other readers pass over. Returns
    size and SHA-256 of what was written. The library's own writer would hold Python's lock
    meanwhile, and so the training loop. Source: the format's description,
    github.com/huggingface/safetensors.
    """
    header: dict[str, Any] = {}
    if info is not None:
        header[METADATA] = sealed(to_metadata(info), tensors)
    end = 0
    # The widest first, so that every tensor is aligned to its own width.
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    for name in names:
        start, end = end, end + tensors[name].nbytes
        kind, shape = DTYPES[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = to_json(header).encode()
    text += b" " * (-len(text) % 8)
    return write_file(
        path,
        [
            len(text).to_bytes(8, "little") + text,
            *(tensors[n].reshape(-1).view(torch.uint8).numpy().data for n in names),
        ],
    )


def load_weights(model: nn.Module, path: Path) -> dict[str, Tensor]:
    """Load weights strictly; returns them.

    Raises UserError where they cannot be, are not what was sealed, or do not fit.
    """
    try:
        stored = load_file(path)
        check_seal(path, stored)
        tensors = fitting(model, stored)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be loaded: {error}; restore it from a backup, or start a new run"
        ) from None
    model.load_state_dict(tensors)
    return tensors


def fitting(model: nn.Module, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file; ValueError unless names, shapes and dtypes are the model's.

    What a loss learned beside the network is passed over where the model has no place for it.
    """
    own = model.state_dict()
    tensors = {n: t for n, t in stored.items() if n in own or not is_centre(n)}
    if odd := own.keys() ^ tensors.keys():
        raise ValueError(f"weights do not fit: {sorted(odd)[:8]}")
    for name, value in tensors.items():
        there, here = (value.dtype, value.shape), (own[name].dtype, own[name].shape)
        if there != here:
            shown = [f"{dtype} {list(shape)}" for dtype, shape in (there, here)]
            raise ValueError(f"weights do not fit: {name} is {shown[0]}, the model's {shown[1]}")
    return tensors


def copy_to_cpu(tensors: dict[str, Tensor], into: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU; the memory of `into` is used where it fits."""
    copies = {}
    for name, tensor in tensors.items():
        old = into.get(name)
        if old is None or old.shape != tensor.shape or old.dtype != tensor.dtype:
            old = torch.empty(tensor.shape, dtype=tensor.dtype)
        copies[name] = old.copy_(tensor.detach())
    return copies


def write_file(path: Path, parts: Sequence[bytes | memoryview]) -> dict[str, int | str]:
    """Write and sync a file; returns what `measure` finds if the disk holds the same bytes."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for part in parts:
            file.write(part)
            digest.update(part)
            size += len(part)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}
