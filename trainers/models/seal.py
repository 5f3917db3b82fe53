"""A seal on a file of weights: a SHA-256 of its metadata and tensors, kept among the metadata.

safetensors holds no checksum of its own: a bit that flips on a disk or on the way to another
machine would be a weight like any other. A run that goes on looks at its checkpoint's manifest;
snapshots, soups, averages, and files that were sent to somebody are alone.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from bigbatch.configs.files import to_json
from bigbatch.trainers.models.weights_file import read_header

_SEAL = "bigbatch-sha256"  # of the metadata


def sealed(metadata: dict[str, str], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The metadata, with the seal of them and of contiguous CPU tensors."""
    return {**metadata, _SEAL: _digest(metadata, tensors)}


def check_seal(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError where a file's tensors, or its metadata, are not what was sealed.

    A file without a seal, of another library or an earlier version, passes. Raises OSError and
    ValueError where its header cannot be read.
    """
    metadata = read_header(path).metadata
    seal = metadata.pop(_SEAL, None)
    if seal is not None and seal != _digest(metadata, tensors):
        raise ValueError(
            "its weights or metadata are not those that were written (another SHA-256 than its "
            "header says)"
        )


def _digest(metadata: dict[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Whatever the order of either."""
    digest = hashlib.sha256(to_json(dict(sorted(metadata.items()))).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
