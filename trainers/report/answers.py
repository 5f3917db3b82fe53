"""Predicted numbers over true ones, as the report shows them. Free of torch."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigbatch.configs.judged import MAE, R2, RMSE
from bigbatch.trainers.report.svg import BLUE, MUTED, figure, to_svg

_MOST_PLOTS = 6  # targets that are drawn, the worst explained ones of more
_MOST_ROWS = 50


def shown_answers(content: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The plots and the table of a run's targets.json; None without one, or of a damaged one."""
    if not content or not content.get("each"):
        return None
    try:
        names = [str(name) for name in content["outputs"]]
        each = content["each"]
        rows = [
            (name, *(_text(score.key, each[score.key][k]) for score in (MAE, RMSE, R2)))
            for k, name in enumerate(names)
        ]
        true, predicted = (np.array(content[key], np.float64) for key in ("true", "predicted"))
        if true.shape != predicted.shape or true.shape[1:] != (len(names),):
            return None
        samples = int(content.get("samples", len(true)))
        explained = [float("-inf") if r2 is None else float(r2) for r2 in each[R2.key]]
    except (KeyError, TypeError, ValueError, IndexError):
        return None
    worst = np.sort(np.argsort(explained, kind="stable")[:_MOST_PLOTS]).tolist()
    return {
        "split": str(content.get("split", "test")),
        "samples": samples,
        "points": len(true),
        "targets": len(names),
        "plots": [scatter(names[k], true[:, k], predicted[:, k], f"target-{k}") for k in worst],
        "rows": rows[:_MOST_ROWS],
    }


def _text(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if key == R2.key else f"{value:.4g}"


def scatter(
    name: str, true: NDArray[np.float64], predicted: NDArray[np.float64], prefix: str
) -> str:
    """SVG of predicted over true numbers [N], with the line on which both are equal."""
    with figure(4.2, 4.0) as (drawn, axes):
        axes.set_title(name)
        finite = np.isfinite(true) & np.isfinite(predicted)
        x, y = true[finite], predicted[finite]
        axes.plot(x, y, "o", color=BLUE, markersize=3.5, alpha=0.35, markeredgewidth=0)
        if len(x):
            ends = [float(min(x.min(), y.min())), float(max(x.max(), y.max()))]
            axes.plot(ends, ends, color=MUTED, linestyle=":", zorder=0.5)
        axes.set_xlabel("true")
        axes.set_ylabel("predicted")
        return to_svg(drawn, prefix, f"Predicted over true {name}")
