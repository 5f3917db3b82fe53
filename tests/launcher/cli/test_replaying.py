"""`bigbatch replay` before torch: what it refuses, and what it hands on."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import RunDir, create_run, event_record
from bigbatch.launcher.cli.main import cli
from bigbatch.trainers.ledger.lines import DIGESTS, FIRST, chained
from bigbatch.trainers.replay.past import find_past


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """Of which ten steps are on record, and no checkpoint is left: it can begin at 0 alone."""
    run = create_run(tmp_path / "runs" / "mine", load_recipe("digits"))
    records = [{"kind": "train", "step": s, "loss": 2.0, "grad_norm": 1.0} for s in range(1, 11)]
    run.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    return run


def call(run: RunDir, *arguments: object) -> Result:
    words = ["replay", run.name, "--runs", str(run.path.parent), *map(str, arguments)]
    return CliRunner().invoke(cli, words)


def test_all_options_are_handed_on(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("bigbatch.launcher.ranks.run_ranks", lambda *given: seen.extend(given))
    out = run.path.parents[1] / "why"
    found = call(
        run, "--step", 7, "--micro", 1, "--sample", "-k", "--layers", "--from", 0,
        "--out", out, "--json",
    )  # fmt: skip
    assert found.exception is None, found.exception
    module, arguments, peers, nproc = seen
    assert (module, peers, nproc) == ("bigbatch.trainers.replay", None, 1)
    assert arguments == [
        *("step", str(run.path), "--step", "7", "--layers", "--micro", "1", "--sample=-k"),
        *("--from", "0", "--out", str(out), "--json"),
    ]


def test_an_audit_hands_on_what_is_drawn(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --seed one that nobody could know before."""
    seen: list[list[str]] = []
    monkeypatch.setattr(
        "bigbatch.launcher.ranks.run_ranks", lambda _, words, *rest: sys.exit(seen.append(words))
    )
    words = ["audit", run.name, "--runs", str(run.path.parent), "--fraction", "0.25"]
    out = run.path / "audit.json"
    for more in ((), (), ("--seed", "7", "--out", str(out), "--json")):
        assert CliRunner().invoke(cli, [*words, *more]).exit_code == 0
    known = ["audit", str(run.path), "--fraction", "0.25", "--seed"]
    assert [one[:5] for one in seen] == [known] * 3
    assert seen[0][5] != seen[1][5]
    assert seen[2][5:] == ["7", "--out", str(out), "--json"]
    out.touch()
    for more, says in (
        (("--out", str(out)), "exists already; choose another --out"),
        (("--seed", "7"), "says which steps are computed again; give --fraction too"),
    ):
        found = CliRunner().invoke(cli, ["audit", str(run.path), *more])
        assert says in str(found.exception)


def test_a_step_that_differs_is_made_again(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it can be, and nobody asks for the ledgers alone."""
    other = create_run(run.path.parent / "other", load_recipe("digits", ["optimizer.lr=4"]))
    other.metrics.write_bytes(run.metrics.read_bytes())
    for one, digit in ((run, "0"), (other, "1")):
        same = chained(FIRST, 5, dict.fromkeys(DIGESTS, "0" * 16))
        differs = chained(same["chain"], 10, dict.fromkeys(DIGESTS, digit * 16))
        one.ledger.write_text(f"{json.dumps(same)}\n{json.dumps(differs)}\n")
    seen: list[Any] = []
    monkeypatch.setattr(
        "bigbatch.launcher.ranks.run_ranks", lambda _, words, *rest: sys.exit(seen.append(words))
    )
    words = ["diff", str(run.path), str(other.path)]
    assert CliRunner().invoke(cli, [*words, "--json"]).exit_code == 0
    assert seen == [[*words, "--json"]]
    shown = CliRunner().invoke(cli, [*words, "--ledgers"])
    assert shown.exit_code == 1
    assert "step 10 differs first in: keys; step 5 is the same in all" in shown.output
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "0" if name == "LOCAL_RANK" else "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert "diff is one process" in str(CliRunner().invoke(cli, words).exception)
    monkeypatch.delenv("RANK")
    other.metrics.write_bytes(b"")
    shown = CliRunner().invoke(cli, words)
    assert shown.exit_code == 1
    assert "not made again, so not looked at below its digests: " in shown.output
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--step", 11), "mine has no step 11: its steps are 1 to 10"),
        (("--step", 5, "--from", 3), "checkpoints after steps none, and 0, the model as it"),
        (("--step", 5, "--before-rollback"), "it had no rollback"),
        (("--step", 5, "--out", "OUT"), "exists already; choose another --out"),
        (("--step", 5, "--out", "RUN/why"), "is in the run, which a replay leaves alone"),
    ],
)
def test_what_it_refuses(run: RunDir, arguments: tuple[object, ...], says: str) -> None:
    places = {"OUT": str(run.path.parent), "RUN": str(run.path)}
    words = [str(a).replace("OUT", places["OUT"]).replace("RUN", places["RUN"]) for a in arguments]
    found = call(run, *words)
    assert isinstance(found.exception, UserError)
    assert says in str(found.exception)


def test_it_is_one_process(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert "replay is one process, and torchrun has started 2" in str(
        call(run, "--step", 5).exception
    )


def test_a_stream_cannot_be_had_again(tmp_path: Path) -> None:
    changes = [
        "data.stream=[a.tar]",
        "reduction=overlapped",
        "duration=10 steps",
        "evaluate.every=5 steps",
    ]
    changes += ["checkpoint.every=5 steps", "data.sampling=uniform", "schedule={name: constant}"]
    run = create_run(tmp_path / "tars", load_recipe("digits", changes))
    with pytest.raises(UserError, match=r"trains on data\.stream, whose samples are drawn anew"):
        find_past(run, 1)


def rollback(first: int, last: int) -> dict[str, Any]:
    return event_record("rollback", last, first=first, last=last, loss=9.0, grad_norm=7.0)


def checkpoint(run: RunDir, step: int, over: list[list[int]]) -> None:
    path = run.checkpoints / f"step-{step:08d}"
    path.mkdir(parents=True)
    (path / "state.json").write_text(json.dumps({"over": over}))


def test_only_checkpoints_of_the_same_try_are_begun_at(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rollback from step 7 over 5 and 6, as counted before them, to the checkpoint after 3."""
    monkeypatch.setattr("bigbatch.trainers.replay.past.verify", lambda path: None)
    told = [event_record("start", 0, threads=1), rollback(4, 6)]
    told += [event_record("start", 3, threads=2)]
    run.events.write_text("".join(json.dumps(event) + "\n" for event in told))
    checkpoint(run, 3, [])
    checkpoint(run, 6, [])  # of the first try, had it not been removed
    checkpoint(run, 8, [[4, 6]])
    past = find_past(run, 8)
    assert (past.start, past.skipped, past.refused) == (3, ([4, 6],), False)
    assert past.attempt(3)["threads"] == 1
    assert past.attempt(4)["threads"] == 2
    assert find_past(run, 9).start == 8
    first = find_past(run, 7, before_rollback=True)
    assert (first.start, first.skipped, first.refused) == (6, (), True)
    assert first.records == {7: {"loss": 9.0, "grad_norm": 7.0}}  # that of the second try is not
    assert first.attempt(7)["threads"] == 1
    with pytest.raises(UserError, match="its rollbacks undid steps 5 to 7; leave out"):
        find_past(run, 8, before_rollback=True)


def test_a_branch_steps_over_what_its_parent_had(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which its own events do not know, and its first checkpoint does."""
    monkeypatch.setattr("bigbatch.trainers.replay.past.verify", lambda path: None)
    manifest = json.loads(run.manifest.read_text())
    manifest["forked_from"] = {"run": "runs/parent", "step": 6, "at": 6}
    run.manifest.write_text(json.dumps(manifest))
    checkpoint(run, 6, [[2, 3]])
    past = find_past(run, 8)
    assert (past.start, past.skipped) == (6, ([2, 3],))
