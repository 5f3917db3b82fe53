"""Argument lists, where runs go, and how several ranks agree on one run."""

import errno
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import create_run
from bigbatch.launcher import start
from bigbatch.launcher.cli.main import cli
from bigbatch.launcher.env import CHOSEN, Peers
from bigbatch.launcher.launchers import Launch, launch_command, worker_command
from bigbatch.launcher.start import (
    agent_command,
    changed_recipe,
    check_start,
    describe_start,
    join_run,
    one_voice,
    ranks_here,
    run_path,
    stored,
)

DIGITS = load_recipe("digits", ["global_batch=256", "micro_batch=64"])
TWO = Peers("torchrun", 0, 0, 2, "a1b2")
PYTHON = [sys.executable, "-P", "-m"]


def test_argument_lists() -> None:
    run = Path("runs/digits")
    assert worker_command(run) == [*PYTHON, "bigbatch.trainers.worker", "runs/digits"]
    # One rank needs no agent.
    assert agent_command(run, 1, stop_at=10) == [
        *(*PYTHON, "bigbatch.trainers.worker", "--stop-at", "10", "runs/digits")
    ]
    assert agent_command(run, 4, stop_at=10) == [
        *(*PYTHON, "bigbatch.trainers.agent", "--nproc", "4", "--stop-at", "10", "runs/digits")
    ]
    assert agent_command(run, 1, nnodes=2, rdzv_endpoint="a:29400") == [
        *(*PYTHON, "bigbatch.trainers.agent", "--nproc", "1"),
        *("--nnodes", "2", "--rdzv-endpoint", "a:29400", "runs/digits"),
    ]


LAUNCHES = {
    "accelerate": (
        Launch("accelerate", nproc=2),
        [
            *(*PYTHON, "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
            *("--num_machines", "1", "--machine_rank", "0", "--main_process_port", "0"),
            *("--mixed_precision", "no", "--dynamo_backend", "no"),
            *("-m", "bigbatch.trainers.worker", "runs/a"),
        ],
    ),
    "accelerate on two machines": (
        Launch("accelerate", nproc=8, nnodes="2", endpoint="n1:29400", node_rank=1),
        [
            *(*PYTHON, "accelerate.commands.launch", "--multi_gpu", "--num_processes", "16"),
            *("--num_machines", "2", "--machine_rank", "1", "--main_process_ip", "n1"),
            *("--main_process_port", "29400", "--mixed_precision", "no"),
            *("--dynamo_backend", "no", "-m", "bigbatch.trainers.worker", "runs/a"),
        ],
    ),
    "deepspeed": (
        Launch("deepspeed", nproc=2),
        [
            *(*PYTHON, "deepspeed.launcher.runner", "--no_local_rank", "--num_gpus", "2"),
            *("--module", "bigbatch.trainers.worker", "runs/a"),
        ],
    ),
    "deepspeed with a hostfile": (
        Launch("deepspeed", nproc=8, nnodes="4", hostfile=Path("hosts"), endpoint="n1:29400"),
        [
            *(*PYTHON, "deepspeed.launcher.runner", "--no_local_rank", "--hostfile", "hosts"),
            *("--num_nodes", "4", "--num_gpus", "8", "--master_addr", "n1"),
            *("--master_port", "29400", "--module", "bigbatch.trainers.worker", "runs/a"),
        ],
    ),
    "srun": (
        Launch("srun", nproc=4, nnodes="2", cpus=6),
        [
            *("srun", "--mpi=none", "--kill-on-bad-exit=1", "--nodes=2"),
            *("--ntasks-per-node=4", "--cpus-per-task=6"),
            *("bash", "-c", 'trap "" TERM USR2; exec "$@"', "rank"),
            *(*PYTHON, "bigbatch.launcher.cli", "resume", "runs/a"),
        ],
    ),
    "torchrun, elastic": (
        Launch(nproc=8, nnodes="2:4", endpoint="n1:29400"),
        [
            *(*PYTHON, "bigbatch.trainers.agent", "--nproc", "8", "--nnodes", "2:4"),
            *("--rdzv-endpoint", "n1:29400", "runs/a"),
        ],
    ),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_the_argument_list_of_each_launcher(name: str) -> None:
    launch, command = LAUNCHES[name]
    assert launch_command(launch, Path("runs/a")) == command


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"nnodes": "4:2"}, "2:8"),
        ({"nnodes": "2; id"}, "2:8"),
        ({"nnodes": "2"}, "--rdzv-endpoint"),
        ({"nnodes": "2", "endpoint": "n1"}, "node1:29400"),
        ({"nnodes": "2", "endpoint": "$(id):1"}, "node1:29400"),
        ({"launcher": "accelerate", "nnodes": "2", "endpoint": "n1:1"}, "--node-rank"),
        ({"launcher": "accelerate", "nnodes": "1:2", "endpoint": "n1:1"}, "MIN:MAX"),
        ({"launcher": "deepspeed", "nnodes": "2"}, "--hostfile"),
        ({"hostfile": Path("hosts")}, "--launcher deepspeed"),
        ({"node_rank": 1}, "--launcher accelerate"),
    ],
    ids=str,
)
def test_launches_that_cannot_be(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Launch(**options)


def test_deepspeed_meets_at_a_port_that_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own choice is 29500: where another run had it, it ended after a minute in a traceback."""
    started: list[list[str]] = []
    monkeypatch.setattr(start.os, "execvpe", lambda name, command, env: started.append(command))
    start.begin(Path("runs/a"), None, Launch(launcher="deepspeed", nproc=2))
    (command,) = started
    host, port = (command[command.index(key) + 1] for key in ("--master_addr", "--master_port"))
    assert port != "29500"
    with socket.socket() as other:
        other.bind((host, int(port)))
    chosen = Launch(launcher="deepspeed", nproc=2, endpoint="127.0.0.1:29400")
    start.begin(Path("runs/a"), None, chosen)
    assert started[1][started[1].index("--master_port") + 1] == "29400"


def test_the_line_that_says_how_a_run_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CHOSEN:
        monkeypatch.delenv(name, raising=False)
    launch = Launch(nproc=2, nnodes="2", endpoint="n1:29400")
    said = describe_start(None, launch, {"OMP_NUM_THREADS": "4"})
    assert said == (
        "ranks 2 on each of 2 machines, launcher torchrun, rendezvous n1:29400, OMP_NUM_THREADS=4"
    )
    peers = Peers("srun", 0, 0, 4, "7")
    said = describe_start(peers, None, {"MASTER_ADDR": "n1", "MASTER_PORT": "10112"})
    assert said == "ranks 4, launcher srun, rendezvous n1:10112"


def test_ranks_here() -> None:
    assert ranks_here(DIGITS, None, 3, 1, {}) == 3
    assert ranks_here(DIGITS, None, None, 1, {"CUDA_VISIBLE_DEVICES": "0,1"}) == 2
    # More GPUs than micro-batches: use as many as have work.
    eight = {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}
    assert ranks_here(DIGITS, None, None, 1, eight) == 4
    assert ranks_here(DIGITS, None, None, 2, eight) == 2
    assert ranks_here(DIGITS, TWO, None, 1, {}) is None
    # Workers that train apart are whole on each rank.
    apart = "{name: post_local, batch: 256, workers: 4, every: 2, start: 4 epochs}"
    recipe = load_recipe("digits", [f"global_batch={apart}", "optimizer=sgd"], say=None)
    assert ranks_here(recipe, None, None, 1, {"CUDA_VISIBLE_DEVICES": "0,1,2"}) == 2
    with pytest.raises(UserError, match="3 ranks for the 4 workers"):
        ranks_here(recipe, None, 3, 1, {})
    # torchrun or srun with one process may start an agent of its own.
    assert ranks_here(DIGITS, Peers("srun", 0, 0, 1, "7"), 4, 1, {}) == 4


@pytest.mark.parametrize("nproc", [5, 256])
def test_more_ranks_than_micro_batches(nproc: int) -> None:
    with pytest.raises(UserError) as caught:
        ranks_here(DIGITS, None, nproc, 1, {})
    for number in (nproc, 256, 64, 4):
        assert str(number) in str(caught.value)
    with pytest.raises(UserError, match="6 ranks"):
        ranks_here(DIGITS, None, 3, 2, {})
    with pytest.raises(UserError, match="8 ranks"):
        ranks_here(DIGITS, Peers("srun", 0, 0, 8, "7"), None, 1, {})


def test_nproc_under_a_launcher_that_started_several() -> None:
    with pytest.raises(UserError, match="torchrun has started 2 processes already"):
        ranks_here(DIGITS, TWO, 2, 1, {})


def test_run_paths(tmp_path: Path) -> None:
    assert run_path(DIGITS, None, Path("/x/y"), None, tmp_path) == Path("/x/y")
    assert run_path(DIGITS, "mine", None, None, tmp_path) == tmp_path / "mine"
    for name in ("digits", "digits-2", "digits-3"):
        assert run_path(DIGITS, None, None, None, tmp_path) == tmp_path / name
        create_run(tmp_path / name, DIGITS)
    # Every rank, at every restart, comes to the same name.
    assert run_path(DIGITS, None, None, TWO, tmp_path) == tmp_path / "digits-a1b2"
    made_up = Peers("torchrun", 0, 0, 2, "e58d19d7-e269-41c2-99da-0123456789ab")
    assert run_path(DIGITS, None, None, made_up, tmp_path) == tmp_path / "digits-e58d19d7"


def test_a_launcher_without_an_id_needs_a_name(tmp_path: Path) -> None:
    nameless = Peers("deepspeed", 0, 0, 2, None)
    with pytest.raises(UserError, match="add --run-name NAME"):
        run_path(DIGITS, None, None, nameless, tmp_path)
    assert run_path(DIGITS, "a", None, nameless, tmp_path) == tmp_path / "a"


def test_ranks_that_start_together_share_one_run(tmp_path: Path) -> None:
    joined: list[Path] = []
    threads = [
        threading.Thread(target=lambda: joined.append(join_run(tmp_path / "a", DIGITS).path))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert joined == [tmp_path / "a"] * 8
    # The same command again, as at a requeue, goes on with the run.
    assert join_run(tmp_path / "a", DIGITS).recipe() == DIGITS


def test_one_of_the_ranks_measures_and_all_of_them_join(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe("digits", [f"data.path={digits}", "augment.mean=measured"])
    path, asked = tmp_path / "a", []
    monkeypatch.setattr(
        "bigbatch.data.measured._measured",
        lambda *_: asked.append(1) or time.sleep(0.2) or {"mean": [0.25], "std": [0.5]},
    )
    threads = [threading.Thread(target=join_run, args=(path, recipe)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert asked == [1]
    assert join_run(path, recipe).recipe().augment.mean == [0.25]
    with pytest.raises(UserError, match=r"with another recipe: augment\.mean"):
        join_run(path, load_recipe("digits", [f"data.path={digits}", "augment.mean=[0.5]"]))


def test_who_waits_for_a_rank_that_failed_says_why(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe("digits", [f"data.path={digits}/none", "augment.mean=measured"])
    path = tmp_path / "a"
    path.mkdir()  # of a rank that is about to fail
    threading.Timer(0.2, path.rmdir).start()
    with pytest.raises(UserError, match="none/train is not a folder"):
        join_run(path, recipe)
    assert not path.exists()


def test_a_run_of_another_recipe_is_not_joined(tmp_path: Path) -> None:
    join_run(tmp_path / "a", DIGITS)
    with pytest.raises(UserError, match="created with another recipe: seed = 3 there, 12345 here;"):
        join_run(tmp_path / "a", load_recipe("digits", ["seed=12345"]))
    # How much is logged reaches no weight.
    join_run(tmp_path / "a", load_recipe("digits", ["log.every=5"]))


def test_a_run_that_nobody_finishes_creating(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match=r"got no recipe\.yaml"):
        join_run(tmp_path / "a", DIGITS, wait_s=0.2)
    assert list((tmp_path / "a").iterdir()) == []


def test_names_outside_the_allow_list_are_refused_at_once(tmp_path: Path) -> None:
    for name in ("..", "a b", "$(id)", "a\nb", "-x"):
        with pytest.raises(UserError, match="is not allowed"):
            join_run(tmp_path / name, DIGITS)
    assert list(tmp_path.iterdir()) == []


def test_missing_shards_name_the_command_that_makes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="`bigbatch shard digits shards/digits`"):
        check_start(DIGITS)
    with pytest.raises(UserError, match="`bigbatch shard SOURCE photos`"):
        check_start(load_recipe("digits", ["data.path=photos"]))


def test_one_rank_of_each_machine_speaks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError), one_voice(Peers("srun", 0, 0, 4, "7")):
        raise UserError("no")
    for rank, local_rank, says in ((1, 1, False), (2, 0, True)):
        with pytest.raises(SystemExit) as caught, one_voice(Peers("srun", rank, local_rank, 4, "")):
            raise UserError("no shards")
        assert caught.value.code == 2
        assert ("no shards" in capsys.readouterr().err) is says


def test_a_run_that_exists_may_change_its_backend_and_nothing_that_it_computes(tmp_path) -> None:
    run = create_run(tmp_path / "run", load_recipe("digits", ["reduction=overlapped"]))
    before = run.recipe_file.read_bytes()
    changed = changed_recipe(run, ("backend=zero1", "data.workers=1"), None)
    assert (changed.backend, changed.data.workers) == ("zero1", 1)
    assert run.recipe_file.read_bytes() == before
    with stored(run, changed, None):
        assert run.recipe() == changed
    assert run.recipe() == changed
    said = (
        r"optimizer\.lr=3: that changes what is computed \(optimizer\.lr = 2\.0 there, 3\.0 here\)"
        r".* you may change name, backend, log, checkpoint, recovery\.corruption, "
        r"recovery\.stall_s, data\.cache,.*"
        r"bigbatch fork"
    )
    with pytest.raises(UserError, match=said):
        changed_recipe(run, ("optimizer.lr=3",), None)
    assert run.recipe() == changed


def test_a_finished_run_changes_no_more(tmp_path) -> None:
    run = create_run(tmp_path / "run", load_recipe("digits", ["reduction=overlapped"]))
    run.summary.write_text("{}")
    assert changed_recipe(run, ("backend=ddp",), None) == run.recipe()  # says what there is
    with pytest.raises(UserError, match="is finished, so backend=zero1 would have no effect"):
        changed_recipe(run, ("backend=zero1",), None)


def test_a_recipe_is_as_it_was_where_the_start_is_refused(tmp_path) -> None:
    run = create_run(tmp_path / "run", load_recipe("digits", ["reduction=overlapped"]))
    before = run.recipe_file.read_bytes()
    changed = changed_recipe(run, ("backend=zero1",), None)
    with pytest.raises(UserError, match="sbatch"), stored(run, changed, None):
        raise UserError("sbatch refused it")
    assert run.recipe_file.read_bytes() == before


@pytest.mark.parametrize(
    "change",
    ["data.path=nowhere", "data.pathh=x", "optimizer.lr=3", "backend=zero9", "data.cache="],
)
def test_a_refused_resume_leaves_every_file_as_it_is(
    tmp_path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # no shards/digits, as `make train` leaves them: it would start
    run = create_run(tmp_path / "run", load_recipe("digits"))
    before = {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}
    result = CliRunner().invoke(cli, ["resume", str(run.path), change, "--nproc", "1"])
    assert isinstance(result.exception, UserError), result
    assert {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()} == before


def test_ranks_wait_for_the_one_that_changes_the_run(tmp_path) -> None:
    run = create_run(tmp_path / "run", load_recipe("digits", ["reduction=overlapped"]))
    found = []
    changed = changed_recipe(run, ("backend=fsdp2",), None)

    def wait() -> None:
        with stored(run, changed, Peers("torchrun", 1, 1, 2, "a1b2")):
            found.append(run.recipe())

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert run.recipe().backend == "ddp"
    with stored(run, changed, TWO):
        assert run.recipe().backend == "fsdp2"
    waiting.join(30)
    assert [recipe.backend for recipe in found] == ["fsdp2"]


def test_a_full_disk_changes_no_run(tmp_path, monkeypatch) -> None:
    run = create_run(tmp_path / "run", load_recipe("digits", ["reduction=overlapped"]))
    before = run.recipe()

    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(start, "write_atomically", full)
    changed = changed_recipe(run, ("backend=zero1",), None)
    with (
        pytest.raises(UserError, match=r"No space left.*resume without KEY=VALUE"),
        stored(run, changed, None),
    ):
        pass
    assert run.recipe() == before
