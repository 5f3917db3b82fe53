"""Each launcher's variables, as captured from the real one; and absurd ones."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigbatch.configs.errors import UserError
from bigbatch.launcher.env import (
    Peers,
    default_nproc,
    find_peers,
    forget_launch,
    hosts,
    interface_to,
    start_variables,
    tasks_per_node,
)

TORCHRUN = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "41823",
    "TORCHELASTIC_RUN_ID": "none",
}
DEEPSPEED = {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "2",
    "WORLD_SIZE": "2",
    "CROSS_RANK": "0",
    "CROSS_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_CPUS_PER_TASK": "6",
}


def test_a_person_at_a_prompt_has_no_peers() -> None:
    assert find_peers({}) is None
    assert find_peers({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}) is None  # salloc


def test_a_batch_shell_is_no_rank() -> None:
    # sbatch sets SLURM_PROCID=0 for the script itself, but it belongs to no numbered step.
    assert find_peers({"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) is None


@pytest.mark.parametrize(
    "prompt", [{"SLURM_PTY_PORT": "33333"}, {"SLURM_STEP_ID": "4294967290"}], ids=["pty", "salloc"]
)
def test_a_shell_inside_a_job_is_a_prompt(prompt: dict[str, str]) -> None:
    assert find_peers({**SRUN, **prompt}) is None


def test_torchrun() -> None:
    assert find_peers(TORCHRUN) == Peers("torchrun", 3, 1, 4, None, {"LOCAL_RANK": "1"})
    named = find_peers({**TORCHRUN, "TORCHELASTIC_RUN_ID": "a1b2"})
    assert named is not None
    assert named.job == "a1b2"


def test_deepspeed() -> None:
    assert find_peers(DEEPSPEED) == Peers("deepspeed", 1, 1, 2, None, {"LOCAL_RANK": "1"})


def test_srun_is_translated_for_torch() -> None:
    assert find_peers(SRUN) == Peers(
        "srun",
        3,
        1,
        4,
        "4711",
        {
            "RANK": "3",
            "WORLD_SIZE": "4",
            "LOCAL_RANK": "1",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "gpu07",
            "MASTER_PORT": str(10_000 + (16 * 4711) % 20_000),
            "OMP_NUM_THREADS": "6",
        },
    )


def test_srun_leaves_a_thread_count_that_was_chosen() -> None:
    peers = find_peers({**SRUN, "OMP_NUM_THREADS": "2"})
    assert peers is not None
    assert "OMP_NUM_THREADS" not in peers.variables


def test_one_node_needs_no_network() -> None:
    peers = find_peers({**SRUN, "SLURM_STEP_NODELIST": "gpu07", "SLURM_NODEID": "0"})
    assert peers is not None
    assert peers.variables["GLOO_SOCKET_IFNAME"] == "lo"
    assert "NCCL_SOCKET_IFNAME" not in peers.variables
    chosen = {"GLOO_SOCKET_IFNAME": "eth7"}
    assert "GLOO_SOCKET_IFNAME" not in start_variables(2, 1, None, chosen)


def test_the_interface_is_the_one_that_leads_to_another_node() -> None:
    assert interface_to("127.0.0.1") == "lo"
    assert interface_to("host.invalid") is None
    several = start_variables(1, 2, "127.0.0.1:29400", {"OMP_NUM_THREADS": "3"})
    assert several == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}
    # Nothing is guessed where a name leads nowhere.
    assert start_variables(1, 2, "host.invalid:1", {"OMP_NUM_THREADS": "3"}) == {}


def test_cores_are_shared_by_the_ranks_of_a_machine() -> None:
    cores = len(os.sched_getaffinity(0))
    for nproc in (1, 2, 4 * cores):
        threads = start_variables(nproc, 1, None, {})["OMP_NUM_THREADS"]
        assert threads == str(max(1, cores // nproc))


@pytest.mark.parametrize(
    ("nodes", "names"),
    [
        ("n1", ["n1"]),
        ("gpu[07-09,12],cpu1", ["gpu07", "gpu08", "gpu09", "gpu12", "cpu1"]),
        ("r[1-2]-n[9-10]", ["r1-n9", "r1-n10", "r2-n9", "r2-n10"]),
    ],
)
def test_all_hosts_of_a_list(nodes: str, names: list[str]) -> None:
    assert list(hosts(nodes)) == names


def test_torchrun_inside_srun_is_torchrun() -> None:
    peers = find_peers({**SRUN, **TORCHRUN})
    assert peers is not None
    assert peers.launcher == "torchrun"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"RANK": "two"}, "RANK='two' must be a whole number"),
        ({"RANK": "-1"}, "RANK='-1' must be a whole number"),
        ({"RANK": "4"}, "RANK=4 must be below WORLD_SIZE=4"),
        ({"WORLD_SIZE": "9" * 40}, "WORLD_SIZE="),
    ],
)
def test_absurd_torchrun_variables(change: dict[str, str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        find_peers({**TORCHRUN, **change})


def test_a_rank_without_a_rendezvous_address() -> None:
    env = {"RANK": "0", "WORLD_SIZE": "2"}
    with pytest.raises(UserError, match="not MASTER_ADDR and MASTER_PORT"):
        find_peers(env)


@pytest.mark.parametrize("name", sorted(set(SRUN) - {"SLURM_NTASKS", "SLURM_CPUS_PER_TASK"}))
@pytest.mark.parametrize("value", [None, "", "x;y", "-3", "$(id)", "9" * 30, "١"])
def test_absurd_slurm_variables_never_crash(name: str, value: str | None) -> None:
    env = {k: v for k, v in {**SRUN, name: value}.items() if v is not None}
    try:
        peers = find_peers(env)
    except UserError:
        return
    assert peers is None or peers.variables["MASTER_ADDR"].isalnum()


@given(st.dictionaries(st.sampled_from([*TORCHRUN, *SRUN]), st.text(max_size=12)))
def test_no_environment_crashes(env: dict[str, str]) -> None:
    try:
        peers = find_peers(env)
    except UserError:
        return
    assert peers is None or 0 <= peers.rank < peers.size


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("n[1-4]", "n1"),
        ("gpu[07-09,12],cpu1", "gpu07"),
        ("rack[1-2]node[03-04]", "rack1node03"),
        ("a-b.example[10].net", "a-b.example10.net"),
    ],
)
def test_first_host(nodes: str, host: str) -> None:
    assert next(hosts(nodes)) == host


@pytest.mark.parametrize("nodes", ["", ",", "n[", "n]1[", "a b", "$(id)", "[1-2"])
def test_a_node_list_without_a_host(nodes: str) -> None:
    with pytest.raises(UserError, match="names no host"):
        next(hosts(nodes))


def test_tasks_per_node() -> None:
    assert tasks_per_node("4(x2),1") == [4, 4, 1]
    assert tasks_per_node("3") == [3]
    with pytest.raises(UserError, match="not a list such as"):
        tasks_per_node("4(x2")


def test_one_process_per_visible_gpu() -> None:
    assert default_nproc({"CUDA_VISIBLE_DEVICES": "0,3"}) == 2
    assert default_nproc({"CUDA_VISIBLE_DEVICES": ""}) == 1
    assert default_nproc({"CUDA_VISIBLE_DEVICES": "-1"}) == 1


LEFT = {
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "10.0.0.1",
    "PMI_SIZE": "2",
    "OMPI_COMM_WORLD_SIZE": "2",
    "TORCHELASTIC_RUN_ID": "4711",
}


@pytest.mark.parametrize("name", sorted({*LEFT, *TORCHRUN, *DEEPSPEED}))
def test_what_another_launch_has_left_is_not_used_and_that_is_said(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    value = {**LEFT, **TORCHRUN, **DEEPSPEED}[name] + "7"
    env = {name: value, "PATH": "/bin", "SLURM_JOB_ID": "1", "OMP_NUM_THREADS": "2"}
    forget_launch(env, None)
    assert env == {"PATH": "/bin", "SLURM_JOB_ID": "1", "OMP_NUM_THREADS": "2"}
    assert f"bigbatch: {name}={value}: left of another launch" in capsys.readouterr().err


def test_a_lone_rank_meets_nobody_and_keeps_its_agent(capsys: pytest.CaptureFixture[str]) -> None:
    env = {**LEFT, "RANK": "0", "WORLD_SIZE": "1", "OMP_NUM_THREADS": "2"}
    forget_launch(env, find_peers(env))
    assert env == {"TORCHELASTIC_RUN_ID": "4711", "OMP_NUM_THREADS": "2"}
    assert not capsys.readouterr().err


def test_ranks_of_a_launch_keep_what_it_says() -> None:
    env = dict(TORCHRUN)
    forget_launch(env, find_peers(env))
    assert env == TORCHRUN
