"""From members on the disk to one file for others, its card, and a check of it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import safetensors.torch

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import to_json, write_atomically
from bigbatch.configs.targets import learns_numbers
from bigbatch.trainers.ensemble.combination import Combination
from bigbatch.trainers.ensemble.members import Member
from bigbatch.trainers.export.card import Score, model_card
from bigbatch.trainers.export.description import as_texts, audits, data_hash, describe
from bigbatch.trainers.export.files import onnx_bytes, program_bytes, trace
from bigbatch.trainers.export.served import Served, ServedMember
from bigbatch.trainers.export.timm_weights import check_single, config_path, timm_config
from bigbatch.trainers.models.seal import sealed
from bigbatch.trainers.models.weights_file import to_metadata
from bigbatch.trainers.planning.targets import target_scaling
from bigbatch.trainers.recovery.tensor_files import copy_to_cpu

ENDINGS = (".onnx", ".pt2", ".safetensors")


def check_ending(path: Path) -> None:
    if path.suffix not in ENDINGS:
        raise UserError(
            f"--out {path}: the name must end in {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}, which "
            "says what to write"
        )


def export(
    path: Path,
    members: Sequence[Member],
    combination: Combination,
    scores: Sequence[Score] = (),
) -> list[Path]:
    """Write members as one file of the kind that its name ends in, and what belongs beside it.

    Members of weight 0 are left out. Returns what was written: the file, timm's config beside
    weights, the card. Nothing that exists is replaced. Raises UserError, and OSError for what a
    disk refuses.
    """
    check_ending(path)
    card, weights = path.with_name(f"{path.name}.md"), path.suffix == ".safetensors"
    if weights and learns_numbers(members[0].recipe):
        raise UserError(
            f"--out {path}: weights alone give numbers in standard deviations of the targets; "
            "export .onnx or .pt2, which give them in the targets' own unit"
        )
    written = [path, *([config_path(path)] if weights else []), card]
    if there := [p for p in written if p.exists()]:
        raise UserError(f"{there[0]} exists already; remove it, or choose another --out")
    members, combination = _of_weight(members, combination)
    description = describe(members, combination, [data_hash(m) for m in members])
    contents: list[str | bytes]
    if weights:
        contents = _weights(members, combination, to_json(description))
    else:
        network = served(members, combination)
        program = trace(network)
        if path.suffix == ".onnx":
            contents = [onnx_bytes(network, program, as_texts(description))]
        else:
            contents = [program_bytes(program, to_json(description))]
    contents.append(model_card(path, description, scores, audits(members)))
    path.parent.mkdir(parents=True, exist_ok=True)
    # The file itself last: where it stands, all of it does.
    for place, content in reversed(list(zip(written, contents, strict=True))):
        write_atomically(place, content)
    return written


def _of_weight(
    members: Sequence[Member], combination: Combination
) -> tuple[Sequence[Member], Combination]:
    """Without members that would be computed for nothing."""
    if combination.weights is None or all(combination.weights):
        return members, combination
    kept = [(m, w) for m, w in zip(members, combination.weights, strict=True) if w]
    return [m for m, _ in kept], replace(combination, weights=tuple(w for _, w in kept))


def served(members: Sequence[Member], combination: Combination) -> Served:
    """Members as one network. UserError, which names the member, where one cannot be loaded."""
    return Served(
        [
            ServedMember(
                name=member.name,
                network=member.build(),
                image_size=member.recipe.eval_size,
                crop_fraction=member.recipe.evaluate.crop_fraction,
                squash=member.recipe.evaluate.squash,
                mean=tuple(member.recipe.augment.pixel_mean),
                std=tuple(member.recipe.augment.pixel_std),
                scaling=target_scaling(member.recipe) if learns_numbers(member.recipe) else None,
            )
            for member in members
        ],
        combination,
    )


def _weights(
    members: Sequence[Member], combination: Combination, description: str
) -> list[str | bytes]:
    """A safetensors file, and timm's config of it."""
    check_single(members, combination)
    (member,) = members
    network = member.build()
    config = timm_config(member, network)
    metadata = {**to_metadata(member.info), "description": description}
    tensors = copy_to_cpu(network.state_dict(), {})
    return [
        safetensors.torch.save(tensors, sealed(metadata, tensors)),
        to_json(config, indent=2) + "\n",
    ]
