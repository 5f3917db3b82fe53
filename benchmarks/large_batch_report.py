"""Tables and the picture of benchmarks/large_batch.py, from its result."""

from pathlib import Path
from typing import Any

import numpy as np

_COLORS = ("#999999", "#0072b2", "#e69f00", "#d55e00", "#009e73", "#cc79a7")


def arms_of(finals: list[dict[str, Any]]) -> dict[tuple[str, int], dict[str, float]]:
    """Of each arm: mean and standard deviation of test accuracy over seeds, %, `running`, the mean
    with training's own BatchNorm statistics, and `loss`: points below the best arm of the
    smallest batch."""
    if not finals:
        return {}
    accuracies: dict[tuple[str, int], list[float]] = {}
    running: dict[tuple[str, int], list[float]] = {}
    for r in finals:
        arm = r["optimizer"], r["batch"]
        running.setdefault(arm, []).append(100 * (r.get("test_running") or 0.0))
        accuracies.setdefault((r["optimizer"], r["batch"]), []).append(100 * (r["test"] or 0.0))
    arms = {
        arm: {
            "mean": float(np.mean(values)),
            "running": float(np.mean(running[arm])),
            "deviation": float(np.std(values, ddof=1)) if len(values) > 1 else float("nan"),
            "seeds": len(values),
        }
        for arm, values in accuracies.items()
    }
    smallest = min(batch for _, batch in arms)
    reference = max(a["mean"] for (_, batch), a in arms.items() if batch == smallest)
    for a in arms.values():
        a["loss"] = reference - a["mean"]
    return arms


def tuning_table(result: dict[str, Any]) -> str:
    """Validation accuracy of each rate that was tried, in the order of the rates."""
    names = list(result["optimizers"])
    lines = [f"| batch | {' | '.join(names)} |", "|---:|" + "---|" * len(names)]
    for batch in result["plan"]["batches"]:
        cells = []
        for name in names:
            tried = sorted(
                (r["lr"], r["val"])
                for r in result["tuning"]
                if (r["optimizer"], r["batch"]) == (name, batch)
            )
            cells.append(
                ", ".join(
                    f"{lr:g}: " + ("diverged" if val is None else f"{100 * val:.1f}")
                    for lr, val in tried
                )
            )
        lines.append(f"| {batch:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def markdown(result: dict[str, Any]) -> str:
    """A row for each batch size, a column for each optimizer.

    Behind the rate stands the mean accuracy with training's own BatchNorm statistics; before it the
    steps of an arm whose batch grows, which takes more.
    """
    rates = {(r["optimizer"], r["batch"]): r["lr"] for r in result["finals"]}
    arms = {(a["optimizer"], a["batch"]): a for a in result["arms"]}
    names = list(result["optimizers"])
    lines = [
        f"| batch | steps | {' | '.join(names)} | best loses |",
        "|---:|---:|" + "---:|" * (len(names) + 1),
    ]
    steps = {(r["optimizer"], r["batch"]): r["steps"] for r in result["finals"] if "steps" in r}
    for batch in result["plan"]["batches"]:
        fewest = min((count for (_, b), count in steps.items() if b == batch), default=0)
        cells = []
        for name in names:
            arm = arms.get((name, batch))
            if arm is None:
                cells.append("not run")
                continue
            count = steps.get((name, batch), fewest)
            grown = f"{count} steps; " if count > fewest else ""
            cells.append(
                f"{arm['mean']:.2f} ± {arm['deviation']:.2f} "
                f"({grown}lr {rates[name, batch]:g}; {arm['running']:.2f})"
            )
        losses = [a["loss"] for (_, b), a in arms.items() if b == batch]
        cells.append(f"{min(losses):.2f}" if losses else "")
        lines.append(f"| {batch:,} | {fewest or ''} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(result: dict[str, Any], file: Path) -> None:
    """Test accuracy by batch size and by steps, a dot for each seed; right: what tuning found."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    for axes in (left, middle):
        axes.set_visible(bool(result["finals"]))  # nothing to show while rates are still tried
    steps = {(r["optimizer"], r["batch"]): r["steps"] for r in result["finals"] if "steps" in r}
    colors = dict(zip(result["optimizers"], _COLORS, strict=False))
    for name, color in colors.items():
        arms = sorted(
            (a for a in result["arms"] if a["optimizer"] == name), key=lambda a: a["batch"]
        )
        left.plot([a["batch"] for a in arms], [a["mean"] for a in arms], color=color, label=name)
        taken = sorted(
            (steps[name, a["batch"]], a["mean"]) for a in arms if (name, a["batch"]) in steps
        )
        if taken:
            middle.plot(*zip(*taken, strict=True), color=color, label=name)
        for r in result["finals"]:
            if r["optimizer"] == name and r["test"] is not None:
                left.plot(r["batch"], 100 * r["test"], ".", color=color)
                middle.plot(r["steps"], 100 * r["test"], ".", color=color)
        for batch, style in zip(result["plan"]["batches"], ("-", "--", "-.", ":"), strict=False):
            tried = [
                (r["lr"] / result["optimizers"][name]["centre"], 100 * r["val"])
                for r in sorted(result["tuning"], key=lambda r: r["lr"])
                if (r["optimizer"], r["batch"]) == (name, batch) and r["val"] is not None
            ]
            label = f"{batch:,}" if name == next(iter(colors)) else None
            if tried:
                right.plot(
                    *zip(*tried, strict=True), style, color=color, lw=1, marker=".", label=label
                )
    left.set_xscale("log", base=2)
    left.set_xticks(result["plan"]["batches"], [f"{b:,}" for b in result["plan"]["batches"]])
    left.set(xlabel="global batch", ylabel="test accuracy, %", title="best rate, other seeds")
    middle.set_xscale("log")
    middle.set(xlabel="steps", ylabel="test accuracy, %", title="what they take in steps")
    right.set_xscale("log")
    right.set(
        xlabel="learning rate / centre at batch 256",
        ylabel="validation accuracy, %",
        title="tuning",
    )
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)
