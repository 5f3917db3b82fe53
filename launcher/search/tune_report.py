"""What a study found: plain values, a table, and report.html with its pictures."""

import base64
import html
import io
import shlex
from pathlib import Path
from typing import Any

import optuna
from matplotlib.figure import Figure
from optuna.trial import FrozenTrial, TrialState

from bigbatch.configs.files import write_atomically
from bigbatch.configs.notices import going_on
from bigbatch.configs.plot_style import MUTED, plot_style
from bigbatch.configs.rundir import RunDir
from bigbatch.configs.space import MAXIMISED, Float, Int
from bigbatch.configs.words import plural
from bigbatch.launcher.search import study
from bigbatch.launcher.search.tune import Search, changes, run_of
from bigbatch.trainers.report.report import write_report as write_run_report

# Colours are those of a run's report. Wide tables and commands scroll by themselves, and pictures,
# which are PNG files beside the page too, keep their white paper in dark mode.
_STYLE = """
:root{--page:#f6f7f9;--card:#fff;--ink:#1b2430;--muted:#5b6675;--grid:#e1e5ea}
@media (prefers-color-scheme: dark){
:root{--page:#10151c;--card:#182029;--ink:#e8edf3;--muted:#9aa7b6;--grid:#2c3743}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:70rem;margin:0 auto;padding:1.5rem 1rem 3rem}
h1{font-size:1.6rem;overflow-wrap:anywhere}h2{font-size:1.15rem;margin:2rem 0 .6rem}
img{display:block;max-width:100%;height:auto;background:#fff;border-radius:.5rem;padding:.5rem}
pre,.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--grid);
border-radius:.5rem;padding:.6rem .8rem;margin:0}
a{color:inherit}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:.25em .8em;text-align:right;white-space:nowrap;border-bottom:1px solid var(--grid)}
tr:last-child td{border-bottom:0}th{color:var(--muted);font-weight:500}.best{font-weight:bold}
"""
_SHOWN = 20  # trials in the terminal's table


def summarise(search: Search, found: optuna.Study) -> dict[str, Any]:
    """Trials, the best ones (the Pareto front, for several objectives), and importances."""
    objectives = search.space.objectives
    best = {t.number for t in _best(found)}
    shares = study.importances(found)
    trials = []
    for t in found.get_trials(deepcopy=False):
        complete = t.state == TrialState.COMPLETE
        trials.append(
            {
                "number": t.number,
                "state": t.state.name.lower(),
                "values": dict(zip(objectives, t.values, strict=True)) if complete else None,
                "params": _values(search, t),
                "evaluations": len(t.intermediate_values),
                "reason": t.user_attrs.get("reason"),
                "run": str(run_of(search, t).path),
                "best": t.number in best,
            }
        )
    return {
        "study": str(search.folder),
        "objectives": list(objectives),
        "trials": trials,
        "best": [{"number": t.number, "overrides": changes(search, t)} for t in _best(found)],
        "importances": {objectives[int(i)]: share for i, share in shares.items()},
    }


def _best(found: optuna.Study) -> list[FrozenTrial]:
    if not _complete(found):
        return []
    return found.best_trials if len(found.directions) > 1 else [found.best_trial]


def _values(search: Search, trial: FrozenTrial) -> dict[str, Any] | None:
    """None for a trial that was killed before all of its parameters were chosen."""
    if search.space.parameters.keys() - trial.params.keys():
        return None
    return study.values(search.space, trial.params)


def table(summary: dict[str, Any]) -> Any:
    """The best trials first; at most 20."""
    from rich.table import Table

    objectives = summary["objectives"]
    complete = [t for t in summary["trials"] if t["values"]]
    others = [t for t in summary["trials"] if not t["values"]]
    first, sign = objectives[0], -1 if objectives[0] in MAXIMISED else 1
    complete.sort(key=lambda t: sign * t["values"][first])
    shown = [*complete, *others][:_SHOWN]
    title = f"{len(shown):,} of {plural(len(summary['trials']), 'trial')}"
    found = Table(title=title, title_justify="left")
    for name in ("trial", "state", *objectives):
        found.add_column(name, justify="right")
    names = list(next((t["params"] for t in shown if t["params"]), {}))
    for name in names:
        found.add_column(name, justify="right")
    for t in shown:
        found.add_row(*_cells(t, objectives, names), style="bold green" if t["best"] else "")
    return found


def _cells(trial: dict[str, Any], objectives: list[str], names: list[str]) -> list[str]:
    """One trial of a summary as text: number, state, objectives, parameters."""
    values, params = trial["values"], trial["params"]
    return [
        str(trial["number"]),
        trial["state"],
        *(f"{values[o]:.5g}" if values else "" for o in objectives),
        *(_short(params[n]) if params else "" for n in names),
    ]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@plot_style()
def write_report(search: Search, found: optuna.Study, summary: dict[str, Any]) -> Path:
    """Write report.html, one self-contained page, and its pictures as PNG beside it.

    The best trials' own reports, to which it leads, are drawn where they are missing.
    """
    pictures = {"history": _history(search, found)}
    if summary["importances"]:
        pictures["importances"] = _importances(summary)
    pictures["parameters"] = _slices(search, found)
    if len(search.space.objectives) > 1:
        pictures["front"] = _front(search, found)
    trials = plural(len(summary["trials"]), "trial")
    parts = [f"<h1>{html.escape(search.recipe)}: {trials}</h1>"]
    for best in summary["best"]:
        command = "bigbatch train " + shlex.join([search.recipe, *best["overrides"]])
        name, run = f"trial {best['number']}", run_of(search, found.trials[best["number"]])
        if _drawn(run):
            name = f'<a href="{run.report.relative_to(search.folder)}">{name}</a>'
        parts.append(f"<p>Best: {name}</p><pre>{html.escape(command)}</pre>")
    for name, figure in pictures.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        (search.folder / f"{name}.png").write_bytes(buffer.getvalue())
        data = base64.b64encode(buffer.getvalue()).decode()
        parts.append(f'<h2>{name}</h2><img alt="{name}" src="data:image/png;base64,{data}">')
    parts.append(_html_table(summary))
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{html.escape(search.recipe)}: tuning</title><style>{_STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )
    path = search.folder / "report.html"
    write_atomically(path, page)
    return path


def _drawn(run: RunDir) -> bool:
    """Whether a trial has a report of its end, which is drawn where it is missing."""
    with going_on(f"no report of {run.path.name}", f"`bigbatch report {run.path}` writes it"):
        if not run.metrics.exists():
            return False  # removed since
        if not run.report.exists() or run.report.stat().st_mtime < run.metrics.stat().st_mtime:
            write_run_report(run)
        return True
    return False


def _html_table(summary: dict[str, Any]) -> str:
    names = list(next((t["params"] for t in summary["trials"] if t["params"]), {}))
    objectives = summary["objectives"]
    head = "".join(f"<th>{html.escape(n)}</th>" for n in ("trial", "state", *objectives, *names))
    rows = []
    for t in summary["trials"]:
        cells = _cells(t, objectives, names)
        row = "".join(f"<td>{html.escape(c)}</td>" for c in cells)
        rows.append(f'<tr class="{"best" if t["best"] else ""}">{row}</tr>')
    table = f"<table><tr>{head}</tr>{''.join(rows)}</table>"
    return f'<h2>trials</h2><div class="scroll">{table}</div>'


def _complete(found: optuna.Study) -> list[FrozenTrial]:
    return found.get_trials(deepcopy=False, states=[TrialState.COMPLETE])


def _history(search: Search, found: optuna.Study) -> Figure:
    """Each objective over the trials, with the best so far."""
    objectives = search.space.objectives
    figure = Figure(figsize=(8, 3.2 * len(objectives)), layout="constrained")
    complete = _complete(found)
    axes: Any = figure.subplots(len(objectives), squeeze=False)[:, 0]
    for i, (objective, ax) in enumerate(zip(objectives, axes, strict=True)):
        numbers = [t.number for t in complete]
        values = [float(t.values[i]) for t in complete]
        choose = max if objective in MAXIMISED else min
        best = [choose(values[: n + 1]) for n in range(len(values))]
        ax.plot(numbers, values, "o", label="trial")
        ax.step(numbers, best, where="post", label="best so far")
        pruned = [t for t in found.get_trials(deepcopy=False) if t.state == TrialState.PRUNED]
        stopped = [(t.number, t.intermediate_values[t.last_step]) for t in pruned if t.last_step]
        if stopped and i == 0:
            ax.plot(*zip(*stopped, strict=True), "x", color=MUTED, label="pruned")
        ax.set(xlabel="trial", ylabel=objective)
        ax.legend()
    return figure


def _importances(summary: dict[str, Any]) -> Figure:
    """Each parameter's share, for each objective."""
    shares = summary["importances"]
    names = list(next(iter(shares.values())))[::-1]
    figure = Figure(figsize=(8, 1 + 0.4 * len(names) * len(shares)), layout="constrained")
    ax = figure.subplots()
    height = 0.8 / len(shares)
    for i, (objective, share) in enumerate(shares.items()):
        places = [n + i * height for n in range(len(names))]
        ax.barh(places, [share.get(n, 0.0) for n in names], height, label=objective)
    ax.set_yticks([n + 0.4 - height / 2 for n in range(len(names))], names)
    ax.set(xlabel="importance (PED-ANOVA)", xlim=(0, 1))
    ax.legend()
    return figure


def _slices(search: Search, found: optuna.Study) -> Figure:
    """The first objective over each parameter."""
    space = search.space.parameters
    columns = min(3, len(space))
    rows = -(-len(space) // columns)
    figure = Figure(figsize=(4 * columns, 3 * rows), layout="constrained")
    axes: Any = figure.subplots(rows, columns, squeeze=False).ravel()
    complete = _complete(found)
    for ax, (key, parameter) in zip(axes, space.items(), strict=False):
        numeric = isinstance(parameter, Float | Int)
        chosen = [t.params[key] if numeric else _short(t.params[key])[:24] for t in complete]
        ax.plot(chosen, [float(t.values[0]) for t in complete], "o")
        if isinstance(parameter, Float | Int) and parameter.log:
            ax.set_xscale("log")
        ax.set(xlabel=key, ylabel=search.space.objectives[0])
    return figure


def _front(search: Search, found: optuna.Study) -> Figure:
    """The first two objectives against each other, the Pareto front marked."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    best = {t.number for t in _best(found)}
    for label, trials in (
        ("trial", [t for t in _complete(found) if t.number not in best]),
        ("Pareto front", [t for t in _complete(found) if t.number in best]),
    ):
        ax.plot([t.values[0] for t in trials], [t.values[1] for t in trials], "o", label=label)
    ax.set(xlabel=search.space.objectives[0], ylabel=search.space.objectives[1])
    ax.legend()
    return figure
