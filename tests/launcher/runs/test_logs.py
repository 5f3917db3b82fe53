"""Merging what the ranks said."""

from pathlib import Path

import pytest

from bigbatch.configs.rundir import RunDir
from bigbatch.launcher.runs.logs import Line, follow, last, paint, read


def stamp(second: int) -> str:
    return f"2026-11-21T10:00:{second:02d}.000000Z"


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    (tmp_path / "logs").mkdir()
    for rank, seconds in ((0, (1, 4)), (1, (2, 3, 5))):
        lines = [f"{stamp(s)} rank {rank} at {s}\n" for s in seconds]
        (tmp_path / "logs" / f"rank-{rank:05d}.log").write_text("".join(lines))
    return RunDir(tmp_path)


def test_ranks_are_merged_by_time(run: RunDir) -> None:
    lines = list(read(run))
    assert [line.text[-1] for line in lines] == list("12345")
    assert [line.rank for line in lines] == [0, 1, 1, 0, 1]
    assert [line.rank for line in read(run, [1])] == [1, 1, 1]
    assert [line.text[-1] for line in last(read(run), 2)] == ["4", "5"]


def test_a_line_without_a_time_stays_where_it_is(run: RunDir) -> None:
    with (run.path / "logs/rank-00000.log").open("a") as file:
        file.write("torn\n")
    assert [line.text for line in read(run, [0])][-1] == "torn"
    assert list(read(run, [0]))[-1].time == stamp(4)


def test_what_slurm_says_comes_last(run: RunDir) -> None:
    said = "slurmstepd-n1: error: *** JOB 7 ON n1 CANCELLED DUE TO PREEMPTION ***"
    (run.path / "slurm-7.out").write_text(f"rank 0 at 4\n{said}\n")
    assert list(read(run))[-1] == Line("", -1, said)
    assert said in paint(Line("", -1, said))
    assert all(line.rank == 1 for line in read(run, [1]))


def test_following_shows_each_line_once_until_the_end(run: RunDir) -> None:
    log = run.path / "logs/rank-00000.log"
    steps = iter([f"{stamp(10)} ten\n{stamp(11)} half", f" and whole\n{stamp(12)}", " twelve\n"])

    def ended() -> bool:
        step = next(steps)
        with log.open("a") as file:
            file.write(step)
        if step != " twelve\n":
            return False
        (run.path / "logs/rank-00002.log").write_text(f"{stamp(20)} late\n")
        return True

    texts = [line.text for line in follow(run, ended=ended)]
    past = [f"rank {r} at {s}" for r, s in ((0, 1), (1, 2), (1, 3), (0, 4), (1, 5))]
    assert texts == [*past, "ten", "half and whole", "twelve", "late"]


def test_following_from_the_last_lines_on_does_not_wait_for_the_end(run: RunDir) -> None:
    lines = follow(run, ended=lambda: False, past=2)
    assert [next(lines).text for _ in range(2)] == ["rank 0 at 4", "rank 1 at 5"]
    with (run.path / "logs/rank-00000.log").open("a") as file:
        file.write(f"{stamp(10)} ten\n{stamp(11)} eleven\n{stamp(12)} twelve\n")
    assert [next(lines).text for _ in range(3)] == ["ten", "eleven", "twelve"]


def test_a_run_without_logs(tmp_path: Path) -> None:
    assert list(read(RunDir(tmp_path))) == []
    assert list(follow(RunDir(tmp_path), ended=lambda: True)) == []


def test_other_files_among_the_logs_are_passed_over(run: RunDir) -> None:
    before = list(read(run))
    (run.path / "logs/rank-old.log").write_text("x\n")
    assert list(read(run)) == before
