"""From a variant to what stands in its folder: a network's weights, or an ONNX file."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bigbatch.configs.durations import Length
from bigbatch.configs.errors import UserError
from bigbatch.configs.files import write_atomically
from bigbatch.configs.size import height_width
from bigbatch.trainers.compress.codebook import encode
from bigbatch.trainers.compress.finetune import finetune
from bigbatch.trainers.compress.int8 import quantise
from bigbatch.trainers.compress.lowrank import factorise
from bigbatch.trainers.compress.onnx_parts import join, network_part, other_parts
from bigbatch.trainers.compress.pruning import Batch, magnitudes, masks_of, prune, taylor_scores
from bigbatch.trainers.compress.structured import prune_channels
from bigbatch.trainers.compress.variants import Variant
from bigbatch.trainers.ensemble.combination import Combination
from bigbatch.trainers.ensemble.folder import Ensemble, open_ensemble, write_ensemble
from bigbatch.trainers.ensemble.members import Member
from bigbatch.trainers.export.description import as_texts, data_hash, describe
from bigbatch.trainers.models.compressed import compression_of
from bigbatch.trainers.models.seal import sealed
from bigbatch.trainers.models.weights_file import COMPRESSION, to_metadata
from bigbatch.trainers.planning.inputs import Inputs
from bigbatch.trainers.recovery.tensor_files import copy_to_cpu


@dataclass(frozen=True)
class Settings:
    """What all variants share."""

    taylor: bool = False  # how weights and channels are scored; else by magnitude
    finetune: Length | None = None
    finetune_lr: float = 0.1  # of the recipe's rate
    images: int = 256  # by which Taylor scores are found, and int8 is calibrated
    calibration: str = "minmax"
    rounds: int = 50  # of timing at batch 1; a quarter at 64


def write_network(
    folder: Path,
    member: Member,
    variant: Variant,
    images: Sequence[Batch],
    inputs: Inputs,
    settings: Settings,
) -> Member:
    """Compress a member, and write it as an ensemble of one, which other commands take.

    Returns the member as it is read again. Raises UserError where the method cannot.
    """
    tensors: Mapping[str, Tensor]
    if variant.method == "codebook":
        assert variant.bits is not None
        tensors = encode(member.build(), variant.bits)
    else:
        network, masks = _network(member, variant, images, settings)
        if settings.finetune is not None:
            length, factor = settings.finetune, settings.finetune_lr
            finetune(network, member.recipe, inputs, length, factor, masks)
        tensors = network.state_dict()
    metadata = to_metadata(member.info)
    methods = [_shaped_by(member), None if variant.method == "prune" else variant.method]
    if any(methods):  # pruning changes values alone
        metadata[COMPRESSION] = "+".join(filter(None, methods))
    record = {"compressed": member.name, "variant": variant.name, "settings": settings_of(settings)}
    with TemporaryDirectory(dir=folder.parent) as scratch:
        weights = Path(scratch) / "model.safetensors"
        copies = copy_to_cpu(dict(tensors), {})
        save_file(copies, weights, sealed(metadata, copies))
        small = replace(member, name=f"{member.name}/{variant.name}", weights=weights)
        write_ensemble(folder, Ensemble((small,), Combination()), record)
    return open_ensemble([folder]).members[0]


def check_variant(member: Member, variant: Variant) -> None:
    """Raise UserError where a method cannot follow the one that a member comes from."""
    model = member.recipe.model
    normed = model.weight_standardization or (
        model.head is not None and model.head.name == "cosine"
    )
    if normed and variant.method != "codebook":
        what = "weight_standardization" if model.weight_standardization else "head = cosine"
        raise UserError(
            f"member {member.name} computes with other weights than it stores (model.{what}), "
            f"which {variant.method} would take for those; use codebook"
        )
    method = _shaped_by(member)
    if method is not None and variant.method in ("lowrank", "codebook"):
        raise UserError(
            f"member {member.name} was compressed by {method} already, and {variant.method} takes "
            "a network as timm builds it; use prune, structured or int8, or the first run"
        )


def _shaped_by(member: Member) -> str | None:
    """By what a member's network is no more that of its name; one of codebooks is, once read."""
    method = compression_of(member.weights)
    return None if method == "codebook" else method


def _network(
    member: Member, variant: Variant, images: Sequence[Batch], settings: Settings
) -> tuple[nn.Module, dict[str, Tensor] | None]:
    """The network before it is trained further, and the masks that hold meanwhile."""
    model = member.build()
    if variant.method == "lowrank":
        return factorise(model, share=variant.share, energy=variant.energy), None
    assert variant.share is not None
    if variant.method == "structured":
        recipe, batches = member.recipe, images if settings.taylor else ()
        size = 2, recipe.data.channels, *height_width(recipe.eval_size)
        example = torch.linspace(-1, 1, math.prod(size)).view(size)
        return prune_channels(model, member.build(), variant.share, example, batches), None
    scores = taylor_scores(model, images) if settings.taylor else magnitudes(model)
    masks = masks_of(scores, variant.share)
    return prune(model, masks), masks


def write_onnx(
    float32: Path, int8: Path, member: Member, images: Sequence[Batch], settings: Settings
) -> None:
    """Write a member as an ONNX file, and as one whose network is quantised."""
    recipe = member.recipe
    metadata = as_texts(describe([member], Combination(), [data_hash(member)]))
    network = network_part(member.build(), recipe.data.channels, recipe.eval_size)
    small = quantise(network, [batch.numpy() for batch, _ in images], settings.calibration)
    before, after = other_parts(member)
    for path, part in ((float32, network), (int8, small)):
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, join(before, part, after, metadata))


def settings_of(settings: Settings) -> dict[str, Any]:
    """Ready for JSON."""
    length = settings.finetune
    return {**vars(settings), "finetune": None if length is None else str(length)}
