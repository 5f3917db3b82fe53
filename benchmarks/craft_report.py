"""Tables of benchmarks/craft.py, and what it decides by them, from its trials."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import t as student
from scipy.stats import ttest_ind

Trials = Sequence[dict[str, Any]]
_UNSTEADY = 4.0  # times the median deviation: an arm whose seeds differ by more is not as the rest


def spread(groups: Sequence[Sequence[float]]) -> tuple[float, int]:
    """The standard deviation over seeds, taken to be the same in all groups, and its freedom."""
    freedom = sum(len(values) - 1 for values in groups)
    squares = sum(float(np.var(values)) * len(values) for values in groups)
    return (math.sqrt(squares / freedom) if freedom else 0.0), freedom


def half_width(deviation: float, freedom: int, *counts: int) -> float | None:
    """Of the 95 % interval of that difference: Student's, by the common deviation."""
    if freedom == 0:
        return None
    error = deviation * math.sqrt(sum(1 / count for count in counts))
    return float(student.ppf(0.975, freedom)) * error


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def rows_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What the table says: of each arm, and of scores taken otherwise, means over seeds."""
    finals: list[tuple[str, str, str, Trials, str]] = []
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for r in [*result["trials"], *result["best"]]:
        groups.setdefault(tuple(r["arms"]), []).append(r)
    for arms, trials in groups.items():
        together = " + ".join(arms)
        arm = result["arms"].get(together)
        if arm is not None:
            finals.append((arm["family"], together, arm["what"], trials, ""))
            continue
        name = "best combination" if arms else "baseline"
        finals.append((name, together, "", trials, ""))
        finals.append((f"{name}, averaged weights", together, "ema", trials, "_ema"))
        finals.append((f"{name}, mirrored looks", together, "--tta flip", trials, "_flip"))
    values = {
        role: [[100 * (r[role + key] or 0.0) for r in trials] for *_, trials, key in finals]
        for role in ("val", "test")
    }
    plain = [v for v, (*_, key) in zip(values["test"], finals, strict=True) if not key]
    several = [v for v in plain if len(v) > 1]
    most = _UNSTEADY * float(np.median([np.std(v, ddof=1) for v in several] or [0.0]))
    deviation, freedom = spread([v for v in several if np.std(v, ddof=1) <= most])
    base = next(v for v, f in zip(values["test"], finals, strict=True) if f[0] == "baseline")
    rows = []
    for (family, name, what, trials, _), val, test in zip(finals, *values.values(), strict=True):
        own = float(np.std(test, ddof=1)) if len(test) > 1 else None
        width = half_width(deviation, freedom, len(base), len(test))
        if own is not None and own > most:  # Welch's, by its own deviation
            interval = ttest_ind(test, base, equal_var=False).confidence_interval()
            width = float(interval.high - interval.low) / 2
        rows.append(
            {
                "family": family,
                "arms": name,
                "what": what,
                "seeds": len(test),
                "val": float(np.mean(val)),
                "test": float(np.mean(test)),
                "deviation": own,
                "gain": float(np.mean(test) - np.mean(base)),
                "half_width": width,
                "seconds": float(np.median([r.get("seconds") or math.nan for r in trials])),
            }
        )
    return rows


def markdown(result: dict[str, Any]) -> str:
    """Rates tried, arms in the order of their gains, combinations tried."""
    tried = ", ".join(f"{r['lr']:g}: {_percent(r['val'])}" for r in result["tuning"])
    lines = [f"validation accuracy of the baseline by rate: {tried}"]
    if not result["trials"]:
        return lines[0]
    rows = rows_of(result)
    lines += ["", _row(["family", "change", "seeds", "validation", "test", "gain"])]
    lines.append("|---|---|---:|---:|---:|---:|")
    for row in sorted(rows, key=lambda r: -r["gain"]):
        deviation = "" if row["deviation"] is None else f" ± {row['deviation']:.2f}"
        gain = f"{row['gain']:+.2f}"
        if row["half_width"] is not None:
            gain += f" ± {row['half_width']:.2f}"
        name = f"`{row['arms']}`" if row["arms"] else ""
        change = ": ".join(part for part in (name, row["what"]) if part)
        lines.append(
            _row(
                [
                    *(row["family"], change, str(row["seeds"]), f"{row['val']:.2f}"),
                    *(f"{row['test']:.2f}{deviation}", "" if not change else gain),
                ]
            )
        )
    if result["combinations"]:
        lines += ["", "validation accuracy of combinations, one seed:"]
        for r in result["combinations"]:
            lines.append(f"- {' + '.join(r['arms']) or 'baseline'}: {_percent(r['val'])}")
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "diverged" if value is None else f"{100 * value:.2f}"
