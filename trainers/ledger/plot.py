"""The curves of two runs, one over the other. Free of torch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bigbatch.configs.decisions import recipe_of
from bigbatch.configs.files import iter_jsonl
from bigbatch.configs.judged import Score, judged_by, shown
from bigbatch.configs.plot_style import BLUE, MUTED, ORANGE, plot_style
from bigbatch.configs.rundir import RunDir

Curve = dict[int, float]  # by finished steps, where it is finite
Runs = tuple[RunDir, RunDir]


def losses(run: RunDir) -> Curve:
    """The training loss."""
    return {r["step"]: r["loss"] for r in _records(run, "train") if r.get("loss") is not None}


def scores(runs: Runs) -> dict[Score, list[Curve]]:
    """Of both runs' validation splits what judges them, and the score beside it, where either run
    has one; {} of runs that are judged by different scores."""
    recipes = [recipe_of(run) for run in runs]
    judge, other = map(judged_by, recipes)
    found: dict[Score, list[Curve]] = {}
    if judge != other:
        return found
    for run, recipe in zip(runs, recipes, strict=True):
        records = [r for r in _records(run, "eval") if r.get("split") == recipe.data.val]
        for score in shown(judge)[:2]:
            curve = {r["step"]: r[score.key] for r in records if r.get(score.key) is not None}
            found.setdefault(score, []).append(curve)
    return {score: curves for score, curves in found.items() if any(curves)}


def _records(run: RunDir, kind: str) -> Iterator[dict[str, Any]]:
    records = iter_jsonl(run.metrics, f'"{kind}"'.encode())
    return (r for r in records if r.get("kind") == kind)


@plot_style()
def draw_curves(runs: Runs, parting: int | None, path: Path) -> None:
    """Training losses and by how much they differ, and beside them validation scores; a line where
    the ledgers part. Raises OSError."""
    import matplotlib.pyplot as plt  # slow

    train, scored = [losses(run) for run in runs], scores(runs)
    common = sorted(train[0].keys() & train[1].keys())
    apart = [abs(train[1][step] - train[0][step]) for step in common]
    columns = 2 if scored else 1
    figure, grid = plt.subplots(
        *(2, columns), sharex=True, squeeze=False, figsize=(8 if columns == 1 else 13, 5.5),
        height_ratios=(3, 2),
    )  # fmt: skip
    (above, *_), (below, *_) = grid
    _over(above, runs, train)
    above.set(title="training loss", ylabel="loss")
    below.plot(common, apart, color=MUTED)
    below.set(title="|A - B|", ylabel="difference")
    below.set_ylim(bottom=0)
    for axes, (score, curves) in zip(grid[:, -1], scored.items(), strict=False):
        _over(axes, runs, curves, marker=".")
        axes.set(title=f"validation {score.title}", ylabel=score.title)
    for axes in grid[-1]:
        axes.set_xlabel("finished steps")
    if parting is not None:
        for axes in grid.flat:
            axes.axvline(parting, color=MUTED, linewidth=1, linestyle=":")
        above.plot([], [], ":", color=MUTED, label=f"step {parting}: the ledgers part")
    above.legend()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _over(axes: Any, runs: Runs, curves: list[Curve], **more: Any) -> None:
    for name, run, curve, colour, dashes in zip(
        "AB", runs, curves, (BLUE, ORANGE), ("-", "--"), strict=True
    ):
        steps = sorted(curve)
        values = [curve[step] for step in steps]
        axes.plot(steps, values, dashes, color=colour, label=f"{name} {run.name}", **more)
