"""The report of whole, unfinished and hostile runs."""

import io
import json
import math
import re
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import IO

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import dump_recipe, load_recipe
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.trainers.monitoring.history import confused_pairs, read_history, smooth
from bigbatch.trainers.report import plots, report
from bigbatch.trainers.report.diagnosis import diagnose
from bigbatch.trainers.report.plots import noise
from bigbatch.trainers.report.report import write_report
from bigbatch.trainers.report.results import final_table, result_rows
from bigbatch.trainers.report.watch import watch

STEPS, CYCLES = 300, 3
PHASES_S = {
    "data": 0.004, "copy": 0.0, "augment": 0.01, "model": 0.03, "reduce": 0.004, "optimizer": 0.002
}  # fmt: skip


def write_details(file: IO[str], step: int) -> None:
    """What is recorded every log.details_every steps."""
    seconds = [list(PHASES_S.values()), [v * 1.2 for v in PHASES_S.values()]]
    ratios = {"conv.weight": 0.01 + step / 1e4, "head.weight": 0.2, "dead.weight": 0.0}
    for record in (
        {"kind": "ranks", "step": step, "phases": list(PHASES_S), "seconds": seconds},
        {"kind": "trust", "step": step, "ratios": ratios},
        {"kind": "system", "step": step, "host_cpu_percent": 50.0},
    ):
        print(json.dumps(record), file=file)


def make_run(path: Path, steps: int = STEPS, finished: bool = True, seed: int = 0) -> RunDir:
    """A run directory like one of the digits recipe, with plausible curves and noise."""
    rng = np.random.default_rng(seed)
    run = create_run(path, load_recipe("digits"))
    total, every = STEPS, 10
    with run.metrics.open("w") as file:
        for step in range(1, steps + 1):
            phase = ((step - 1) % (total / CYCLES)) / (total / CYCLES)
            lr = 6.0 * 0.5 * (math.cos(math.pi * phase) + 1)
            loss = 0.45 + 1.9 * math.exp(-step / 25) + 0.06 * lr / 6 + rng.normal(0, 0.02)
            step_s = 0.05 + abs(rng.normal(0, 0.004))
            record = {
                "kind": "train",
                "step": step,
                "epoch": step * 256 / 1077,
                "loss": loss,
                "lr": lr,
                "grad_norm": 0.4 + 3 * math.exp(-step / 20) * rng.uniform(0.8, 1.2),
                "grad_sq_micro": 0.5 + 9 * math.exp(-step / 20) + abs(rng.normal(0, 0.05)),
                "noise_scale": 200.0 + 2 * step,
                "images_per_s": 256 / step_s,
                "data_s": 0.002 * rng.uniform(0, 2),
                "step_s": step_s,
                "phases": PHASES_S,
                "slowest": {"rank": 1, "phase": "data", "share": 0.12, "shard": "000003.tar"},
            }
            print(json.dumps(record), file=file)
            if step % 50 == 0:
                write_details(file, step)
            if step % every == 0:
                error = 0.02 + 0.9 * math.exp(-step / 22) + 0.02 * lr / 6
                scores = {"accuracy": 1 - error, "nll": 2.5 * error, "ece": error / 3}
                print(
                    json.dumps({"kind": "eval", "step": step, "split": "val", **scores}), file=file
                )
    events = [
        {"kind": "start", "step": 0, "world_size": 2, "device": "cpu", "total_steps": total},
        {"kind": "signal", "step": 120, "signal": 15},
        {"kind": "end", "step": 120, "state": "stopped"},
        {"kind": "start", "step": 120, "world_size": 1, "device": "cpu", "total_steps": total},
    ]
    pixels = rng.integers(0, 255, (256, 512), dtype=np.uint8)
    Image.fromarray(pixels).save(run.path / "augmented.png")
    if finished:
        events.append({"kind": "end", "step": total, "state": "finished"})
        finish(run, rng)
    stamp = {"time": 1.75e9, "date": "2025-06-15T14:00:00+0000"}
    run.events.write_text("".join(json.dumps(stamp | e) + "\n" for e in events))
    return run


def finish(run: RunDir, rng: np.random.Generator) -> None:
    def figures(accuracy: float) -> dict[str, float]:
        return {"accuracy": accuracy, "nll": 4 * (1 - accuracy), "ece": (1 - accuracy) / 2}

    def split(shift: float) -> dict[str, object]:
        members = [
            {"name": f"cycle-{i:02d}", **figures(a + shift), "kept": a > 0.96}
            for i, a in ((1, 0.955), (2, 0.974), (3, 0.978))
        ]
        return {
            "members": members,
            "ensemble": figures(0.983 + shift),
            "soup": figures(0.979 + shift),
        }

    summary = {"val": split(0.004), "test": split(0), "steps": STEPS, "samples": STEPS * 256}
    run.summary.write_text(json.dumps(summary | {"world_size": 2}))
    for cycle in range(1, CYCLES + 1):
        folder = run.snapshots / f"cycle-{cycle:02d}"
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps({"step": cycle * STEPS // CYCLES}))
    matrix = np.diag(rng.integers(33, 37, 10))
    matrix[8, 1], matrix[3, 5], matrix[9, 4] = 3, 1, 2
    run.ensemble.mkdir()
    table = {"split": "test", "classes": [str(i) for i in range(10)], "matrix": matrix.tolist()}
    (run.ensemble / "confusion.json").write_text(json.dumps(table))


class Page(HTMLParser):
    """Checks nesting, and collects ids, images and references of a page."""

    VOID = frozenset(("meta", "br", "img"))

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.pictures = 0
        self.scripts = 0
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.pictures += tag == "svg"
        self.scripts += tag == "script"
        for key, value in attrs:
            if key == "id":
                self.ids.append(value or "")
            if key in ("src", "href", "xlink:href"):
                self.references.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a finished run, whose plots take seconds."""
    return write_report(make_run(tmp_path_factory.mktemp("report") / "digits")).read_text()


def test_a_finished_run(text: str) -> None:
    page = Page(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert page.pictures == 11  # six curves, phases, noise scale, trust ratios, members, confusion
    assert "Gradient noise scale" in text
    assert "cycle, with 95 % interval" in text
    assert "Rank 1 is the slowest: 12% of a step" in text
    assert "shard 000003.tar" in text
    for wanted in ("98.30%", "cycle-01 (left out)", "resume", "soup", "Converged", "optimizer:"):
        assert wanted in text
    assert "is not there" not in text


def test_the_page_refers_to_nothing_outside(text: str) -> None:
    page = Page(text)
    assert page.references
    assert all(r.startswith(("#", "data:image/png;base64,")) for r in page.references)
    assert page.scripts == 0


def test_plots_take_their_colours_from_the_page(text: str) -> None:
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert "var(--blue)" in drawings
    # Black or white left over would vanish in one of the two modes.
    assert not re.search(r"(fill|stroke): #", drawings)


@pytest.mark.parametrize("steps", [0, 1, 7, 120])
def test_an_unfinished_run_says_what_is_missing(tmp_path: Path, steps: int) -> None:
    run = make_run(tmp_path / "digits", steps=steps, finished=False)
    text = write_report(run).read_text()
    assert Page(text).open == []
    assert "running" in text
    assert "summary.json is not there" in text
    assert ("Not at the end yet" in text) == (steps >= 20)
    assert "ensemble/confusion.json is not there" in text
    assert ("metrics.jsonl holds no training step" in text) == (steps == 0)


def test_a_bare_run_directory_has_a_report(tmp_path: Path) -> None:
    run = create_run(tmp_path / "bare", load_recipe("digits"))
    text = write_report(run).read_text()
    assert "not started" in text
    assert "augmented.png is not there" in text
    assert "events.jsonl holds no event" in text


def test_no_run_directory_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run directory"):
        write_report(RunDir(tmp_path))


def test_names_from_outside_stay_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / "digits")
    evil = "<script>alert('$x$')</script>"
    file = run.ensemble / "confusion.json"
    table = json.loads(file.read_text())
    table["classes"][:2] = [evil, "$\\frac{"]
    table["matrix"][0][1] = 5
    file.write_text(json.dumps(table))
    with run.events.open("a") as events:
        print(json.dumps({"kind": evil, "note": evil}), file=events)
    page = Page(write_report(run).read_text())
    assert page.scripts == 0
    assert page.open == []


@pytest.mark.usefixtures("no_plots")
def test_damaged_files_count_as_missing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "digits")
    run.summary.write_text('{"val": ')
    run.manifest.unlink()
    with run.metrics.open("a") as file:
        file.write('{"kind": "train", "st')
    assert "summary.json is not there" in write_report(run).read_text()


@pytest.mark.usefixtures("no_plots")
def test_a_summary_with_losses_that_are_null(tmp_path: Path) -> None:
    run = make_run(tmp_path / "digits")
    summary = json.loads(run.summary.read_text())
    for split in ("val", "test"):
        for entry in (*summary[split]["members"], summary[split]["ensemble"]):
            entry["nll"] = None
    run.summary.write_text(json.dumps(summary))
    page = write_report(run).read_text()
    assert "points against the best single member. On" in page


def test_diverged_run_with_nan_losses(tmp_path: Path) -> None:
    run = make_run(tmp_path / "digits", steps=100, finished=False)
    with run.metrics.open("a") as file:
        for step in range(101, 160):
            loss = None if step > 150 else 9.0
            print(json.dumps({"kind": "train", "step": step, "loss": loss, "lr": 6.0}), file=file)
    titles = {f.title: f.level for f in diagnose(read_history(run))}
    assert titles["Diverged"] == "problem"
    assert titles["Non-finite loss, gradient or statistics"] == "problem"
    assert "Diverged" in write_report(run).read_text()


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_run_without_one_finite_value(tmp_path: Path) -> None:
    run = create_run(tmp_path / "nan", load_recipe("digits"))
    with run.metrics.open("w") as file:
        for step in range(1, 41):
            values = dict.fromkeys(("loss", "lr", "grad_norm", "images_per_s", "data_s", "step_s"))
            print(json.dumps({"kind": "train", "step": step, **values}), file=file)
            if step % 8 == 0:
                scores = {"accuracy": None, "nll": None}
                print(
                    json.dumps({"kind": "eval", "split": "val", "step": step, **scores}), file=file
                )
    assert "Non-finite loss, gradient or statistics" in write_report(run).read_text()
    watch(run, ended=lambda: None, console=Console(file=io.StringIO(), width=100))


Curve = Callable[[float], float]  # of the share of the run that is done


def falling(t: float) -> float:
    return 2 * 0.01**t


@pytest.mark.parametrize(
    ("title", "accuracy", "nll", "loss"),
    [
        ("Converged", lambda t: 0.9 - 0.5 * 0.001**t, lambda t: 0.4 + 0.001**t, falling),
        ("Still improving at the end", lambda t: 0.5 + 0.4 * t, lambda t: 1.5 - t, falling),
        ("Over-fitting", lambda t: 0.7, lambda t: 1 + abs(t - 0.3), falling),
        ("Too slow", lambda t: 0.12, lambda t: 2.2, lambda t: 2.3 - 0.1 * t),
        ("Under-fitting", lambda t: 0.12, lambda t: 2.2, lambda t: 2.0 + 0.3 * 0.001**t),
    ],
)
def test_diagnosis_of_the_fit(
    tmp_path: Path, title: str, accuracy: Curve, nll: Curve, loss: Curve
) -> None:
    run = create_run(tmp_path / "curve", load_recipe("digits"))
    with run.metrics.open("w") as file:
        for step in range(1, 201):
            t = step / 200
            print(json.dumps({"kind": "train", "step": step, "loss": loss(t)}), file=file)
            if step % 10 == 0:
                scores = {"accuracy": accuracy(t), "nll": nll(t)}
                print(
                    json.dumps({"kind": "eval", "split": "val", "step": step, **scores}), file=file
                )
    assert title in [f.title for f in diagnose(read_history(run))]


def test_final_table_prints_every_figure(tmp_path: Path) -> None:
    summary = json.loads(make_run(tmp_path / "digits").summary.read_text())
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(final_table(summary))
    text = console.export_text()
    assert "cycle-01 (out)" in text
    assert re.search(r"ensemble +98\.70% +0\.0520 +0\.0065 +98\.30% +0\.0680 +0\.0085 *\n", text)
    assert [row[0] for row in result_rows(summary)][-2:] == ["ensemble", "soup"]


@pytest.mark.usefixtures("no_plots")
def test_averaged_weights_are_a_row_behind_the_soup(tmp_path: Path) -> None:
    run = make_run(tmp_path / "digits")
    summary = json.loads(run.summary.read_text())
    for split in ("val", "test"):
        summary[split]["ema"] = {"accuracy": 0.9876, "nll": 0.0123, "ece": 0.0045}
    run.summary.write_text(json.dumps(summary))
    assert [row[0] for row in result_rows(summary)][-2:] == ["soup", "ema"]
    text = write_report(run).read_text()
    assert re.search(r'class="strong">\s*<td class="nowrap">ema</td>\s*<td class="n">98.76%', text)


def test_large_runs_and_many_classes_stay_small(tmp_path: Path) -> None:
    run = make_run(tmp_path / "digits", finished=True)
    lines = run.metrics.read_text().splitlines()
    with run.metrics.open("a") as file:
        for step in range(301, 20_000):
            record = json.loads(lines[0]) | {"step": step, "loss": 1 + step % 7}
            print(json.dumps(record), file=file)
    count = 200
    matrix = np.full((count, count), 0) + 50 * np.eye(count, dtype=int)
    classes = [f"n{i:08d}, a rather long name of a synset" for i in range(count)]
    table = {"classes": classes, "matrix": matrix.tolist()}
    (run.ensemble / "confusion.json").write_text(json.dumps(table))
    assert write_report(run).stat().st_size < 1_500_000


def test_smooth_is_unbiased_and_steps_over_nan() -> None:
    values = np.array([4.0, np.nan, 4.0, 4.0])
    np.testing.assert_allclose(smooth(values), 4.0)
    assert np.isnan(smooth(np.array([np.nan, 1.0]))[0])


def test_a_million_events_are_counted_and_not_all_shown(tmp_path: Path) -> None:
    """A file of 200 MB made a page of 215 MB and took 2.9 GB."""
    run = make_run(tmp_path / "run", steps=30, finished=False)
    start = {"kind": "start", "step": 0, "total_steps": 30, "world_size": 2}
    trouble = {"kind": "disk", "step": 1, "error": "x" * 5000}
    run.events.write_text(
        "".join(json.dumps(e) + "\n" for e in [trouble] * 500 + [start] + [trouble] * 3000)
    )
    history = read_history(run)
    kinds = Counter(e["kind"] for e in history.events)
    assert kinds == {"disk": 1100, "start": 1, "left_out": 2}
    assert [e["events"] for e in history.events if e["kind"] == "left_out"] == [400, 2000]
    assert (history.total_steps, history.state) == (30, "running")
    page = write_report(run).read_text()
    assert "events 2000" in page
    assert len(page) < 2_000_000


def test_a_damaged_summary_or_picture_of_mistakes_leaves_a_report(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=30, finished=False)
    run.ensemble.mkdir(exist_ok=True)
    for path in (run.summary, run.manifest, run.ensemble / "confusion.json"):
        path.write_bytes(b"[" * 100_000)
    assert "<html" in write_report(run).read_text()


@pytest.mark.parametrize("scale", [0.3, 1.0, 7.0, 4000.0])
def test_the_noise_scale_has_numbers_on_its_axis(tmp_path: Path, scale: float) -> None:
    """A logarithmic axis within one power of ten would have none."""
    history = read_history(make_run(tmp_path / "digits"))
    history.train["noise_scale"] *= scale
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", noise(history, []))
    beside = texts[texts.index("step") :]  # those of the steps come before
    assert len([t for t in beside if re.fullmatch(r"[\d,.]+k?", t)]) >= 2


def test_the_mistakes_of_tens_of_thousands_of_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The matrix of 30,000 classes took 24 GB."""
    monkeypatch.setattr(
        plots, "confusion", lambda classes, matrix, images: (classes, matrix.tolist())
    )
    monkeypatch.setattr(report, "_HARDEST", 2)
    history = read_history(make_run(tmp_path / "run", steps=1, finished=False))
    pairs = [[i, i, 9] for i in range(30_000)] + [[7, 29_999, 5], [29_999, 7, 2], [8, 3, 1]]
    classes = [f"c{i}" for i in range(30_000)]
    table = {"split": "val", "classes": classes, "pairs": sorted(pairs)}
    tracemalloc.start()
    try:
        found = report._confusion(replace(history, confusion=table))
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()
    assert found is not None
    assert found["plot"] == (["c7", "c29999"], [[9, 5], [2, 9]])
    assert (found["shown"], found["total"], found["wrong"]) == (2, 270_008, 8)
    assert found["mistakes"] == [("c7", "c29999", 5), ("c29999", "c7", 2), ("c8", "c3", 1)]
    assert found["recalls"][0] == ("c7", 9 / 14, 14)


def test_both_forms_of_the_mistakes_say_the_same(tmp_path: Path) -> None:
    matrix = np.random.default_rng(1).integers(0, 3, (7, 7))
    pairs = [[i, j, int(matrix[i, j])] for i in range(7) for j in range(7) if matrix[i, j]]
    assert confused_pairs({"matrix": matrix.tolist()}).tolist() == pairs
    assert confused_pairs({"pairs": pairs}).tolist() == pairs
    assert confused_pairs({"pairs": []}).shape == (0, 3)


def test_a_batch_that_changes(tmp_path: Path, no_plots: None) -> None:
    """A branch: its first records are of a parent whose batch was a number, and do not say it."""
    run = make_run(tmp_path / "digits", steps=60, finished=False)
    pieces = "[{batch: 256, until: 7680 samples}, {batch: 1024}]"
    keys = ["schedule={name: constant}", f"global_batch={{name: stages, pieces: {pieces}}}"]
    run.recipe_file.write_text(dump_recipe(load_recipe("digits", keys, say=None)))
    records = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    for record in records:
        if record["kind"] == "train" and (over := record["step"] - 30) > 0:
            record |= {"global_batch": 1024, "samples": 7680 + over * 1024}
    run.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    history = read_history(run)
    assert history.samples == 30 * 256 + 30 * 1024
    assert history.batches.tolist() == [256] * 30 + [1024] * 30
    page = write_report(run).read_text()
    assert "global batch 256 to 1,024, 60 epochs" in page
    assert "256 to 1,024 a step" in page
    rate = history.samples / float(np.sum(history.train["step_s"]))
    assert f"{rate:,.0f}" in page
    assert "<svg" in noise(history, [])
