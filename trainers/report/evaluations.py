"""What the report shows of the splits that a run was evaluated on. Free of torch."""

from pathlib import Path
from typing import Any

from bigbatch.configs.rundir import RunDir
from bigbatch.trainers.evaluation.record import EVALUATION, WORST, read_evaluation
from bigbatch.trainers.evaluation.words import in_words
from bigbatch.trainers.report.evaluation_plots import pictures
from bigbatch.trainers.report.svg import png_uri


def shown_evaluations(run: RunDir) -> list[dict[str, Any]]:
    """A dictionary for each of evaluations/*, by name; of a file that is no good, its `problem`."""
    files = sorted(run.evaluations.glob(f"*/{EVALUATION}"))
    return [_shown(file.parent, f"split{number}-") for number, file in enumerate(files)]


def _shown(folder: Path, prefix: str) -> dict[str, Any]:
    try:
        found = read_evaluation(folder)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        where = f"{folder.parent.name}/{folder.name}/{EVALUATION}"
        return {"problem": f"{where} cannot be read: {reason}; bigbatch evaluate writes it anew"}
    return {
        "problem": None,
        "name": folder.name,
        "source": found["source"],
        "samples": found["samples"],
        "notes": [*found["notes"], *_how(found)],
        "rows": list(_rows(found)),
        "sentences": [*_of_classes(found), *in_words(found)],
        "pictures": pictures(found, prefix),
        "mistakes": found["mistakes_drawn"],
        "worst": png_uri(folder / WORST) if found["mistakes_drawn"] else None,
    }


def _how(found: dict[str, Any]) -> list[str]:
    """What was done beside one plain look at each image."""
    said = [] if found["tta"] == "none" else [f"looks: {found['tta']}"]
    if found["mc_dropout"]:
        said.append(f"passes of each with dropout: {found['mc_dropout']}")
    return said


def _rows(found: dict[str, Any]) -> list[tuple[str, dict[str, Any], bool]]:
    """(model, figures, whether it is what serves): members, then what they are together."""
    members = found["members"]
    rows = [(row["name"], row, False) for row in (members or {"each": []})["each"]]
    name = "ensemble" if members else found["member_names"][0]
    before = found["before_temperature"]
    if before:
        plain = {"accuracy": found["accuracy"], "accuracy_interval": None} | before
        rows.append((name, plain, False))
        name = f"{name} at temperature {found['temperature'] or 1:.3g}"
    return [*rows, (name, found, True)]


def _of_classes(found: dict[str, Any]) -> list[str]:
    said = [f"Balanced accuracy, the mean over classes: {found['balanced_accuracy']:.2%}"]
    if found["top5"] is not None and found["top5_interval"] is not None:
        low, high = found["top5_interval"]
        said.append(f"Among the first five: {found['top5']:.2%} (95 %: {low:.1%} to {high:.1%})")
    return said
