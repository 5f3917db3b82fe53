"""Hostile names, recipes, options and environments: one clear message, exit status 2, and
nothing executed, nothing written."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bigbatch.launcher.cli.main import main

# What Python reports of processes started and objects unpickled (PEP 578). Hooks stay for
# good, so this one listens only while a test asks it to.
_DEEDS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "pickle.find_class")
_seen: list[str] | None = None


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if _seen is not None and event in _DEEDS:
        _seen.append(f"{event} {args}")
        raise AssertionError(f"{event} {args}")


sys.addaudithook(_hook)

RECIPE = """\
data: {path: shards/mine}
model: {name: resnet18}
optimizer: {name: sgd, lr: 0.1}
duration: 5 epochs
global_batch: 64
"""


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.fixture
def place(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to work in, beside canaries; nothing outside `runs` may change, nor there."""
    home = tmp_path / "canary" / "home"
    home.mkdir(parents=True)
    sound = {"path": str(digits), "channels": 1, "image_size": 8}
    recipe = RECIPE.replace("{path: shards/mine}", json.dumps(sound))
    (home / "mine.yaml").write_text(recipe + "augment: {mean: [0.5], std: [0.2]}\n")
    (tmp_path / "canary" / "untouched").write_text("as it was")
    monkeypatch.chdir(home)
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC_")) or name in (
            "RANK",
            "WORLD_SIZE",
            "OMP_NUM_THREADS",
        ):
            monkeypatch.delenv(name)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield tmp_path
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def refused(
    place: Path, capsys: pytest.CaptureFixture[str], *arguments: str, short: bool = True
) -> str:
    """Run the command line in this process; returns its message."""
    global _seen
    before = tree(place)
    sys.argv = ["bigbatch", *arguments]
    _seen = []
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        deeds, _seen = _seen, None
    said = capsys.readouterr()
    assert ended.value.code == 2, said
    assert deeds == []
    assert tree(place) == before
    assert "Traceback" not in said.err
    # One message of ours; click's own ends in one line of "Error: ...".
    assert said.err.startswith("bigbatch: ") != ("\nError: " in said.err)
    if short:
        assert len(said.err) < 4000
    return said.err


@pytest.fixture(autouse=True)
def restore_argv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)


NAMES = [
    "a\nb", "a\rb", "a'b", 'a"b', "$(touch owned)", "`touch owned`", "a;touch owned", "a|b", "a&b",
    "../escape", "../../canary/escape", "..", ".", "/tmp/escape", "a/b", "~", "ünïcode", "名前",
    "a\u202eb", "a b", "-rf", "%s%n", "{{7*7}}", "a" * 101, "a\x00b", "\x1b[31m", "*", "a\\b", "😀",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=ascii)
@pytest.mark.parametrize("command", ["train", "submit"])
def test_names_of_runs(
    place: Path, capsys: pytest.CaptureFixture[str], command: str, name: str
) -> None:
    assert "not allowed" in refused(place, capsys, command, "mine.yaml", f"--run={name}")


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names_in_recipes(place: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    refused(place, capsys, "train", "mine.yaml", f"name={json.dumps(name)}")


BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
RECIPES = {
    "python-object": RECIPE + "x: !!python/object/apply:os.system ['touch owned']\n",
    "python-name": RECIPE + "x: !!python/name:os.system\n",
    "python-module": "!!python/module:os\n",
    "unknown-tag": RECIPE + "x: !evil 1\n",
    "binary": RECIPE + "x: !!binary Z2lm\n",
    "set": RECIPE + "x: !!set {a, b}\n",
    "ordered-map": RECIPE + "x: !!omap [a: 1]\n",
    "timestamp": RECIPE + "seed: 2001-01-01\n",
    "no-such-day": RECIPE + "seed: 2001-99-99\n",
    "alias-bomb": BOMB,
    "alias-bomb-in-options": BOMB
    + RECIPE.replace("{name: resnet18}", "{name: resnet18, options: {x: *i}}"),
    "merge-bomb": "a: &a {x: 1}\n"
    + "".join(
        f"{b}: &{b} {{<<: [{','.join([f'*{a}'] * 9)}]}}\n"
        for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    ),
    "endless-alias": RECIPE + "x: &x [*x]\n",
    "endless-map": "&x {data: *x}\n",
    "deep-lists": "x: " + "[" * 20_000 + "]" * 20_000,
    "deep-maps": "x: " + "{a: " * 5_000 + "1" + "}" * 5_000,
    "deep-blocks": "".join(" " * i + "a:\n" for i in range(1000)),
    "long-string": RECIPE.replace("resnet18", "x" * 900_000),
    "long-key": RECIPE + "y" * 900_000 + ": 1\n",
    "long-number": RECIPE + "seed: " + "9" * 100_000 + "\n",
    "long-hexadecimal": RECIPE + "seed: 0x" + "f" * 100_000 + "\n",
    "too-large": RECIPE + "#" * 1_000_001,
    "nan": RECIPE.replace("0.1", ".nan"),
    "infinite": RECIPE.replace("0.1", ".inf"),
    "overflow": RECIPE.replace("0.1", "1e999"),
    "negative-rate": RECIPE.replace("0.1", "-0.1"),
    "negative-batch": RECIPE.replace("64", "-64"),
    "zero-batch": RECIPE.replace("64", "0"),
    "negative-seed": RECIPE + "seed: -1\n",
    "seed-overflow": RECIPE + "seed: 9223372036854775808\n",
    "negative-duration": RECIPE.replace("5 epochs", "-5 epochs"),
    "endless-duration": RECIPE.replace("5 epochs", "1e999 epochs"),
    "overflowing-duration": RECIPE.replace("5 epochs", "9" * 400 + " epochs"),
    "unicode-digits": RECIPE.replace("5 epochs", "٥ epochs"),
    "text-for-number": RECIPE.replace("64", "many"),
    "list-for-part": RECIPE.replace("{name: resnet18}", "[resnet18]"),
    "null-part": RECIPE.replace("{name: resnet18}", "null"),
    "empty": "",
    "only-a-list": "- a\n- b\n",
    "only-text": "hello",
    "two-documents": RECIPE + "---\n" + RECIPE,
    "number-as-key": RECIPE + "1: 2\n",
    "list-as-key": RECIPE + "? [a, b]\n: 2\n",
    "key-twice": RECIPE + "seed: 1\nseed: 2\n",
    "control-characters": RECIPE + "name: a\x07b\n",
    "nul": RECIPE + "name: a\x00b\n",
    "tab": RECIPE + "\tseed: 1\n",
    "template": RECIPE + "name: '{{ config }}'\n",
    "base-of-itself": "base: hostile.yaml\n" + RECIPE,
    "base-elsewhere": "base: /etc/passwd\n" + RECIPE,
    "base-no-text": "base: [a]\n" + RECIPE,
    "base-nul": 'base: "a\\0.yaml"\n' + RECIPE,
    "base-long": "base: " + "x" * 5000 + ".yaml\n" + RECIPE,
    "path-nul": RECIPE.replace("shards/mine", '"a\\0b"'),
    "path-long": RECIPE.replace("shards/mine", "x" * 5000),
    "path-newline": RECIPE.replace("shards/mine", '"a\\nb"'),
    "path-device": RECIPE.replace("shards/mine", "/dev/zero"),
    "split-outside": RECIPE.replace("shards/mine", "., train: ../../untouched"),
    "model-path": RECIPE.replace("resnet18", "../../untouched"),
    "huge-micro-batch": RECIPE + "micro_batch: 1" + "0" * 400 + "\n",
    "surrogates": RECIPE + 'name: "\\ud800"\n',
    "secret-in-url": RECIPE.replace("shards/mine", "https://me:hunter22@host/x"),
    "presigned-url": RECIPE.replace("shards/mine", "https://h/x?X-Amz-Signature=0123456789"),
    "secret-option": RECIPE.replace("resnet18", "resnet18, options: {hub_token: hunter22}"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(place: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    Path("hostile.yaml").write_text(RECIPES[name], encoding="utf-8", errors="surrogatepass")
    said = refused(place, capsys, "train", "hostile.yaml")
    assert "hunter22" not in said
    assert "0123456789" not in said


def test_bytes_that_are_no_text(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("hostile.yaml").write_bytes(b"\xff\xfe\x00name: \x80")
    refused(place, capsys, "train", "hostile.yaml")


OVERRIDES = [
    "", "=", "=1", "a", "..=1", "a..b=1", "optimizer=", "optimizer.lr=!!python/name:os.system",
    "optimizer.lr=$(touch owned)", "optimizer.lr.x=1", "seed=1e400", "__class__=1", "model.name=[",
    "data.path=\n", "model.options=&x [*x]", "name=\x00", "seed=" + "9" * 5000,
    "x" * 100_000 + "=1", ".".join("a" * 3000) + "=1", "base=/etc/passwd", "augment.mean=[1,2]",
    "global_batch=1_000_001",
]  # fmt: skip


@pytest.mark.parametrize("override", OVERRIDES, ids=lambda text: ascii(text[:40]))
def test_overrides(place: Path, capsys: pytest.CaptureFixture[str], override: str) -> None:
    refused(place, capsys, "train", "mine.yaml", "--", override)


SRUN = {
    "SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "7",
    "SLURM_NODEID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}  # fmt: skip
TORCHRUN = {
    "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost",
    "MASTER_PORT": "1234",
}  # fmt: skip
ENVIRONMENTS: list[dict[str, str]] = [
    *({k: v for k, v in SRUN.items() if k != name} for name in list(SRUN)[2:7]),
    *({**SRUN, name: "$(touch owned)"} for name in SRUN),
    *({**SRUN, name: "-1"} for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID")),
    {**SRUN, "SLURM_PROCID": "2"},
    {**SRUN, "SLURM_PROCID": "9" * 400},
    {**SRUN, "SLURM_PROCID": "٣"},
    {**SRUN, "SLURM_PROCID": "1\n2"},
    {**SRUN, "SLURM_STEP_NUM_TASKS": "0"},
    {**SRUN, "SLURM_STEP_NUM_TASKS": "999999999999"},
    {**SRUN, "SLURM_STEP_NODELIST": "a;touch owned"},
    {**SRUN, "SLURM_STEP_NODELIST": "[" * 100_000},
    {**SRUN, "SLURM_STEP_TASKS_PER_NODE": "999999(x999999)"},
    {**SRUN, "SLURM_STEP_TASKS_PER_NODE": "1," * 50_000},
    {**SRUN, "SLURM_CPUS_PER_TASK": "lots"},
    *({**TORCHRUN, name: "$(touch owned)"} for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")),
    {**TORCHRUN, "RANK": "-1"},
    {**TORCHRUN, "RANK": "2"},
    {**TORCHRUN, "WORLD_SIZE": "1e3"},
    {**TORCHRUN, "TORCHELASTIC_RUN_ID": "../../escape"},
    {**TORCHRUN, "TORCHELASTIC_RUN_ID": "$(touch owned)"},
    {k: v for k, v in TORCHRUN.items() if k != "MASTER_ADDR"},
]


@pytest.mark.parametrize("number", range(len(ENVIRONMENTS)))
def test_environments(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    for name, value in ENVIRONMENTS[number].items():
        monkeypatch.setenv(name, value)
    own_name = "TORCHELASTIC_RUN_ID" in ENVIRONMENTS[number]
    name = [] if own_name else ["--run-name", "run"]
    refused(place, capsys, "train", "mine.yaml", "micro_batch=32", *name)


SUBMISSIONS = [
    ["--nodes", "1;touch owned"], ["--nodes", "-1"], ["--nodes", "0"], ["--nodes", "1e9"],
    ["--nodes", "1٣"], ["--nodes", ""], ["--time", "$(touch owned)"], ["--time", "1\n#SBATCH --x"],
    ["--partition", "a b"], ["--partition", "a\n#SBATCH --wrap=id"], ["--account", "`id`"],
    ["--qos", "a'b"], ["--constraint", "a;b"], ["--sbatch-arg", "--wrap=touch owned"],
    ["--sbatch-arg", "-o/tmp/x"], ["--sbatch-arg", "--output=../../x\n"], ["--sbatch-arg", "x"],
    ["--sbatch-arg", "--comment=$(id)"], ["--gpus-per-node", "-1"], ["--cpus-per-rank", "0"],
    ["--run-dir", "a\nb"], ["--run-dir", "../../canary/$(id)"],
    ["--sbatch-arg", "--export=WANDB_API_KEY=hunter22hunter22"],
]  # fmt: skip


@pytest.mark.parametrize("options", SUBMISSIONS, ids=ascii)
def test_submissions(place: Path, capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    said = refused(place, capsys, "submit", "mine.yaml", "--dry-run", "--no-check", *options)
    assert "hunter22" not in said


@pytest.mark.parametrize("name", [n for n in NAMES if n not in (".", "..", "~", "/tmp/escape")])
@pytest.mark.parametrize("command", ["status", "report"])
def test_runs_that_are_not_there(
    place: Path, capsys: pytest.CaptureFixture[str], command: str, name: str
) -> None:
    refused(place, capsys, command, "--", name)
