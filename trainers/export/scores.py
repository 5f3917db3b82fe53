"""What is known already of how well members do together: summaries, records, evaluations."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bigbatch.configs.errors import UserError
from bigbatch.configs.json_text import parse_json
from bigbatch.configs.rundir import ENSEMBLE, RunDir
from bigbatch.configs.targets import learns_targets
from bigbatch.trainers.ensemble.combination import Combination
from bigbatch.trainers.ensemble.folder import read_record
from bigbatch.trainers.ensemble.members import Member
from bigbatch.trainers.evaluation.record import EVALUATION
from bigbatch.trainers.export.card import Score
from bigbatch.trainers.planning.inputs import open_split

SOUP = "soup"


def known_scores(model: Path, members: Sequence[Member], combination: Combination) -> list[Score]:
    """The scores that the run or folder `model` holds of just these members, by split.

    Of a run, its summary knows each snapshot, the mean of those that were kept, and the soup; of
    an ensemble's folder, its record. What `bigbatch evaluate` found counts before either. None
    where targets were learned: the scores are others.
    """
    if learns_targets(members[0].recipe):
        return []
    if (model / ENSEMBLE).is_file():
        found = _recorded(read_record(model))
    else:
        found = _summarised(RunDir(model), members)
    for path in sorted(model.glob(f"evaluations/*/{EVALUATION}")):
        found.update(_evaluated(_read(path), members, combination))
    alone = len(members) == 1 and not members[0].name.endswith(f"/{SOUP}")
    chosen = not alone or combination != Combination()
    val = members[0].recipe.data.val
    return [
        Score(
            split,
            accuracy=scores["accuracy"],
            nll=scores["nll"],
            ece=scores["ece"],
            images=images,
            chosen_by=chosen and split == val,
        )
        for split, (scores, images) in sorted(found.items())
    ]


Known = dict[str, tuple[dict[str, float], int | None]]  # by split: scores, and of how many images


def _summarised(run: RunDir, members: Sequence[Member]) -> Known:
    summary = _read(run.summary)
    data = members[0].recipe.data
    names = [member.name.removeprefix(f"{run.name}/") for member in members]
    found: Known = {}
    for role, split in (("val", data.val), ("test", data.test)):
        scores = _of(summary.get(role) or {}, names)
        if scores is not None and split is not None:
            found[split] = scores, _images(members[0], split)
    return found


def _of(scores: dict[str, Any], names: list[str]) -> dict[str, float] | None:
    by_name = {member["name"]: member for member in scores.get("members", [])}
    if len(names) > 1:
        kept = [name for name, member in by_name.items() if member["kept"]]
        return scores.get("ensemble") if sorted(names) == sorted(kept) else None
    return scores.get(SOUP) if names == [SOUP] else by_name.get(names[0])


def _recorded(record: dict[str, Any]) -> Known:
    """What an ensemble was reported on when it was made."""
    place, scores = record.get("reported_on"), record.get("reported")
    if not place or not scores:
        return {}
    return {Path(place["place"]).name: (scores, place["samples"])}


def _evaluated(
    evaluation: dict[str, Any], members: Sequence[Member], combination: Combination
) -> Known:
    """What `bigbatch evaluate` has written, where it is of these members on plain looks."""
    plain = evaluation.get("tta") == "none" and not evaluation.get("mc_dropout")
    if not (
        plain
        and evaluation.get("combination") == combination.method
        and sorted(evaluation.get("member_names", [])) == sorted(m.name for m in members)
    ):
        return {}
    return {Path(evaluation["source"]).name: (evaluation, evaluation["samples"])}


def _read(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _images(member: Member, split: str) -> int | None:
    try:
        return len(open_split(member.recipe.data, split))
    except UserError:
        return None
