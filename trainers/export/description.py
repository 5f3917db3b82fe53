"""What an exported file says of itself: enough to use it, and to know where it came from."""

from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import iter_jsonl, read_json, to_json
from bigbatch.configs.identity import recipe_hash
from bigbatch.configs.json_text import parse_json
from bigbatch.configs.notices import notice
from bigbatch.configs.rundir import RunDir
from bigbatch.configs.targets import learns_numbers
from bigbatch.trainers.ensemble.combination import Combination
from bigbatch.trainers.ensemble.members import Member
from bigbatch.trainers.planning.inputs import open_order, open_split
from bigbatch.trainers.recovery.stored import STATE, list_checkpoints

FORMAT = 1


def describe(
    members: Sequence[Member], combination: Combination, data_hashes: Sequence[str | None]
) -> dict[str, Any]:
    """Plain values; `outputs` in place of `classes` where these are numbers. What all members share
    stands at the top as well as with each of them.

    `data_hashes` are those of the members' training data, None where it is not known.
    """
    entries = [
        {
            "name": member.name,
            "model": member.recipe.model.name,
            "image_size": member.recipe.eval_size,
            "crop_fraction": member.recipe.evaluate.crop_fraction,
            "crop_mode": member.recipe.evaluate.crop_mode,
            "mean": member.recipe.augment.pixel_mean,
            "std": member.recipe.augment.pixel_std,
            "recipe": member.recipe.model_dump(mode="json"),
            "recipe_hash": recipe_hash(member.recipe),
            "data_hash": data_hash,
        }
        for member, data_hash in zip(members, data_hashes, strict=True)
    ]
    shared = {
        key: value
        for key, value in entries[0].items()
        if key != "name" and all(entry[key] == value for entry in entries)
    }
    numbers = learns_numbers(members[0].recipe)
    return {
        "format": FORMAT,
        "bigbatch_version": metadata.version("bigbatch"),
        "outputs" if numbers else "classes": list(members[0].classes),
        "channels": members[0].recipe.data.channels,
        **shared,
        "members": entries,
        "combination": combination.to_json(),
        "temperature": combination.temperature,
        "reject_below": combination.reject_below,
    }


def as_texts(description: Mapping[str, Any]) -> dict[str, str]:
    """Each value as JSON, for metadata that are texts."""
    return {key: to_json(value) for key, value in description.items()}


def data_hash(member: Member) -> str | None:
    """The hash of the index that a member was trained on, of a stream of the one it was chosen by.

    None where the shards are not here, or are no more those that the run's checkpoints tell of,
    which is then said.
    """
    recipe, data = member.recipe, member.recipe.data
    try:
        index = open_split(data, data.val if data.stream else data.train)
    except UserError:
        return None
    trained = _trained_order(member)
    if data.stream or trained in (None, open_order(recipe, index).hash):
        return index.hash
    notice(
        f"member {member.name}: {index.place} holds other samples than those it was trained on; "
        "the file does not name its data"
    )
    return None


def audits(members: Sequence[Member]) -> list[str]:
    """What the certificates say that lie in the members' runs, a paragraph each.

    One of another ledger than the run's is left out, which is said.
    """
    found = []
    for run in dict.fromkeys(map(_run_of, members)):
        told = None if run is None else read_json(run.certificate)
        if run is None or told is None:
            continue
        text, of = told.get("paragraph"), told.get("ledger")
        if isinstance(text, str) and isinstance(of, dict) and _is_of(run, of):
            found.append(" ".join(text.split()))
        else:
            notice(f"{run.certificate} is no certificate of this run's ledger: the card has none")
    return found


def _is_of(run: RunDir, of: Mapping[str, Any]) -> bool:
    """Whether a run's ledger has a certificate's chain at its step."""
    step = of.get("step")
    lines = iter_jsonl(run.ledger, f'"step": {step},'.encode())
    own = (line.get("chain") for line in lines if line.get("step") == step)
    return of.get("chain") in {chain for chain in own if chain is not None}


def _run_of(member: Member) -> RunDir | None:
    path = next((p for p in member.weights.parents if (p / "recipe.yaml").is_file()), None)
    return None if path is None else RunDir(path)


def _trained_order(member: Member) -> str | None:
    """The hash of the order, and so of the index, by the newest checkpoint of a member's run."""
    run = _run_of(member)
    for folder in list_checkpoints(run.checkpoints)[:1] if run else ():
        try:
            found = parse_json((folder / STATE).read_bytes())["fingerprint"]["order_hash"]
        except (OSError, ValueError, LookupError, TypeError):
            return None
        return found if isinstance(found, str) else None
    return None
