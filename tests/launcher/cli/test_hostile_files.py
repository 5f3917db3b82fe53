"""Damaged and odd files, generated: correct work, or one clear message and exit status 2.

Each case changes a sound file as its number says, runs the command line in this process and
looks: no traceback, nothing beside the working folder, little more memory than of sound files.
"""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.launcher.cli.main import main
from bigbatch.trainers import worker
from tests.helpers.micro_batches import image_bytes, pictures, write_shards
from tests.launcher.cli.test_hostile import _DEEDS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

Run = Callable[..., tuple[int, str]]
_deeds: list[str] | None = None


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if _deeds is not None and event in _DEEDS:
        _deeds.append(f"{event} {args}")


sys.addaudithook(_hook)


def peak() -> int:
    """Kilobytes that this process has held at most since `forget_peak`."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Run]:
    """The command line, in a folder `work` beside which nothing may change."""
    (tmp_path / "work").mkdir()
    (tmp_path / "untouched").write_text("as it was")
    monkeypatch.chdir(tmp_path / "work")

    def call(*arguments: str) -> tuple[int, str]:
        global _deeds
        monkeypatch.setattr(sys, "argv", ["bigbatch", *arguments])
        _deeds = []
        forget_peak()
        before = peak()
        status = 0
        try:
            main()
        except SystemExit as ended:
            status = int(ended.code or 0)
        finally:
            deeds, _deeds = _deeds, None
        said = "".join(capfd.readouterr())
        finds = arguments[0] == "inspect"  # problems are what it looks for
        assert status in (0, 2) or (finds and status == 1 and "problem: " in said), said
        assert deeds == []
        assert "Traceback" not in said
        if status == 2:
            assert said.count("bigbatch: ") + said.count("\nError: ") >= 1, said
            assert len(said) < 4000, said[:500]
        assert peak() < 1.5 * before, (arguments, before, peak())
        return status, said

    yield call
    assert {path.name for path in tmp_path.iterdir()} == {"untouched", "work"}
    assert (tmp_path / "untouched").read_text() == "as it was"


def damaged(content: bytes, draw: np.random.Generator) -> bytes:
    """Other bytes than these: cut, flipped, repeated, zeroed, or with more behind."""
    size = len(content)
    at = int(draw.integers(0, max(1, size)))
    some = int(draw.integers(1, 600))
    match draw.integers(0, 7):
        case 0:
            return content[:at]
        case 1:
            changed = bytearray(content)
            for place in draw.integers(0, max(1, size), 8).tolist():
                changed[place : place + 1] = bytes([int(draw.integers(0, 256))])
            return bytes(changed)
        case 2:
            return content[:at] + bytes(some) + content[at + some :]
        case 3:
            return content[:at] + content[at : at + some] + content[at:]
        case 4:
            return content[:at] + content[at + some :]
        case 5:
            return content + draw.integers(0, 256, some, np.uint8).tobytes()
        case _:
            return b"" if at % 2 else draw.integers(0, 256, some, np.uint8).tobytes()


ODD: list[Any] = [
    None, True, -1, 0, 2**63, 10**30, 1e308, "", "x", "\x1b[31m", "../../untouched", "/etc/passwd",
    "a" * 5000, "\u202e", [], {}, [[]], {"a": {}}, [None], [1, "x"], "nan", "9" * 400,
]  # fmt: skip


def odd(value: Any, draw: np.random.Generator) -> Any:
    """The same tree of plain values with one of them, or a key, changed."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key = list(value)[int(draw.integers(0, len(value)))]
        rest = {k: v for k, v in value.items() if k != key}
        how = draw.random()
        if how < 0.15:
            return rest
        if how < 0.25:
            return value | {"unknown": 1}
        return value | {key: odd(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.7:
        place = int(draw.integers(0, len(value)))
        how = draw.random()
        if how < 0.2:
            return value[:place] + value[place + 1 :]
        if how < 0.4:
            return [*value, value[place]]
        return [*value[:place], odd(value[place], draw), *value[place + 1 :]]
    return ODD[int(draw.integers(0, len(ODD)))]


def odd_file(path: Path, draw: np.random.Generator) -> None:
    """Change a file: one of JSON mostly as a tree, others as bytes."""
    content = path.read_bytes()
    lines = content.splitlines() if path.suffix == ".jsonl" else [content]
    place = int(draw.integers(0, max(1, len(lines))))
    as_tree = path.suffix in (".json", ".jsonl") and draw.random() < 0.8
    try:
        lines[place] = json.dumps(odd(json.loads(lines[place]), draw)).encode()
    except (ValueError, IndexError):  # no JSON, or an empty file
        as_tree = False
    path.write_bytes(b"\n".join(lines) + b"\n" if as_tree else damaged(content, draw))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "shards"
    write_shards(folder / "val", pictures())
    return folder


SPLITS = ("data.train=val", "data.test=null", "data.channels=3", "data.sampling=uniform")
SMALL = (
    *("augment.mean=[0.5,0.5,0.5]", "augment.std=[0.2,0.2,0.2]", "global_batch=8"),
    *("micro_batch=8", "duration=2 steps", "schedule={name: constant}", "evaluate.every=2 steps"),
    *("model={name: test_resnet}", "data.image_size=16", "data.workers=0", "data.threads=1"),
    *("optimizer={name: sgd, lr: 0.1, momentum: 0.9}", "log.wandb=off", "checkpoint.every=1 steps"),
    *("average=null", "evaluate.precise_bn=never", "log.diagnosis=false", "ensemble.soup=false"),
)


@pytest.mark.parametrize("number", range(80))
def test_tars(run: Run, shards: Path, number: int) -> None:
    """What is indexed is read again as it was packed."""
    draw = np.random.default_rng([1, number])
    Path("s/val").mkdir(parents=True)
    for path in sorted((shards / "val").glob("*.tar")):
        shutil.copy(path, "s/val")
    tars = sorted(Path("s/val").iterdir())
    path = tars[number % len(tars)]
    path.write_bytes(damaged(path.read_bytes(), draw))
    if run("index", "s")[0] == 0:
        assert run("inspect", "s")[0] in (0, 1)


@pytest.mark.parametrize("number", range(80))
def test_indexes(run: Run, shards: Path, number: int) -> None:
    draw = np.random.default_rng([2, number])
    shutil.copytree(shards, "s")
    files = sorted(p for p in Path("s/val/index").rglob("*") if p.is_file())
    odd_file(files[number % len(files)], draw)
    run("inspect", "s")
    run("check", "digits", "data.path=s", "--quick", *SPLITS, *SMALL)


NAMES = [
    "\x1b[2J", "a\tb", "\u202eabc", "[red]x", "{{ 7 }}", "$(touch owned)", "`id`", "a b", " a",
    "名前", "é", "e\u0301", "CON", "-rf", "--help", "a'b\"c", "<script>", "%s%n", "a\\nb",
    "\u200b", "😀", "nan", "null", "0", "-1", "1e5", "#", "a,b", "a;b", "x" * 200,
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_class_names(run: Run, name: str) -> None:
    for folder in (name, "other"):
        (Path("images") / folder).mkdir(parents=True)
        for number in range(6):
            (Path("images") / folder / f"{number}.jpg").write_bytes(image_bytes(number + 1))
    status, _ = run("shard", "images", "s")
    assert status == 0
    classes = (Path("s") / "classes.txt").read_text().splitlines()
    shown = "".join("_" if c in "\x1b\t" else c for c in name)  # what moves a cursor stays out
    assert sorted(classes) == sorted([shown, "other"])
    status, said = run("inspect", "s")
    assert status == 0
    assert "\x1b[2J" not in said


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A finished run of two steps, with checkpoints, snapshots, records, summary and report."""
    recipe = load_recipe("digits", [f"data.path={shards}", *SPLITS, *SMALL])
    made = create_run(tmp_path_factory.mktemp("sound") / "run", recipe)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bigbatch.trainers.finish.say_results", lambda *_: [])
        assert worker.main([str(made.path)]) == 0
    made.report.write_text("here")
    return made


def changed_run(trained: RunDir, of: str, draw: np.random.Generator, number: int) -> None:
    """runs/a: a copy with one file changed."""
    shutil.copytree(trained.path, "runs/a")
    found = (p for p in Path("runs/a").rglob(of) if p.is_file() and p.name != "report.html")
    files = sorted(found)
    odd_file(files[number % len(files)], draw)


@pytest.mark.parametrize("number", range(50))
def test_checkpoints(run: Run, trained: RunDir, number: int) -> None:
    changed_run(trained, "checkpoints/step-00000002/*", np.random.default_rng([3, number]), number)
    run("fork", "a", "--no-train", "--run", "branch")
    run("runs")


@pytest.mark.parametrize("number", range(60))
def test_runs(run: Run, trained: RunDir, number: int, no_plots: None) -> None:
    """recipe.yaml, manifests, records, summaries, evaluations."""
    changed_run(trained, "*.*", np.random.default_rng([4, number]), number)
    run("runs")
    run("status", "a")
    run("diagnose", "a")
    run("report", "a")


SPACE: dict[str, Any] = {
    "objectives": ["accuracy", "nll"],
    "parameters": {
        "optimizer.lr": {"type": "float", "low": 0.01, "high": 1.0, "log": True},
        "schedule.cycles": {"type": "int", "low": 1, "high": 3},
        "optimizer.momentum": {"type": "choice", "choices": [0.8, 0.9, 0.95]},
        "optimizer.weight_decay": {"type": "float", "low": 0.1, "high": 0.5, "step": 0.1},
    },
}


@pytest.mark.parametrize("number", range(40))
def test_spaces(run: Run, digits: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """JSON is YAML. What is accepted would start trials, which this test does not."""

    def accepted(*_: Any) -> None:
        raise SystemExit(0)

    monkeypatch.setattr("bigbatch.launcher.search.tune.run_search", accepted)
    draw = np.random.default_rng([5, number])
    text = json.dumps(odd(SPACE, draw))
    if number % 4 == 0:
        Path("space.yaml").write_bytes(damaged(json.dumps(SPACE, indent=1).encode(), draw))
    else:
        Path("space.yaml").write_text(text)
    run("tune", "digits", "space.yaml", f"data.path={digits}")
