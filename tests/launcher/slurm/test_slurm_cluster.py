"""Runs on a real SLURM of four nodes on this machine; skipped with a reason elsewhere."""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from bigbatch.configs.files import read_jsonl
from bigbatch.configs.rundir import RunDir
from bigbatch.launcher.prove import relative_difference
from bigbatch.launcher.slurm.submit import job_of
from bigbatch.trainers.monitoring.wandb_view import history_steps
from bigbatch.trainers.recovery.signals import SAVED
from tests.helpers.slurm_cluster import BIGBATCH, Place, missing, slurm_cluster

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(missing() is not None, reason=f"SLURM: {missing()}"),
]
TEMPLATE = Path(__file__).parents[3] / "slurm" / "train.sbatch"
STEPS = 60
# Changes to digits for a trial of seconds, with an evaluation after each step.
TRIAL = [
    *(f"duration={STEPS} steps", "evaluate.every=1 steps", "checkpoint.every=1000 steps"),
    *("data.image_size=16", "global_batch=256", "schedule={name: constant}", "log.wandb=off"),
    *("optimizer={name: adamw, lr: 0.01}", "ensemble.soup=false"),
]
SMALL = [TRIAL[0], "evaluate.every=1000 steps", *TRIAL[2:]]
CHANGES = [f"duration={STEPS} steps", "evaluate.every=20 steps", "checkpoint.every=1000 steps"]


@pytest.fixture(scope="module")
def place(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("place")
    (folder / "shards").symlink_to(Path(shards) / "shards")
    with ExitStack() as stack:
        try:
            cluster = stack.enter_context(slurm_cluster(tmp_path_factory.mktemp("slurm")))
        except (TimeoutError, OSError) as error:  # a container may forbid what daemons need
            pytest.skip(f"SLURM does not start here: {error}")
        here = Place(folder, cluster, CHANGES)
        here.call(BIGBATCH, "train", "digits", *CHANGES, "--run", "local", "--nproc", "4")
        yield here


def assert_same_weights(run: RunDir, reference: RunDir) -> None:
    """Bit for bit: the last checkpoint's weights and optimizer state."""
    name = f"step-{STEPS:08d}"
    for file in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = run.checkpoints / name / file, reference.checkpoints / name / file
        assert relative_difference(ours, theirs) == 0.0


@contextmanager
def begun(place: Place, command: Sequence[object]) -> Iterator[subprocess.Popen[str]]:
    """A command in the background; what is left of it at the end is killed."""
    words = [str(word) for word in command]
    env, out = place.cluster.env, subprocess.PIPE
    with subprocess.Popen(words, cwd=place.folder, env=env, stdout=out, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def assert_every_step_once(run: RunDir) -> None:
    steps = [r["step"] for r in read_jsonl(run.metrics) if r["kind"] == "train"]
    assert steps == list(range(1, STEPS + 1))


def test_two_nodes_give_the_weights_of_this_machine(place: Place) -> None:
    job = place.submit("two-nodes", "--nodes", "2", "--ranks-per-node", "2")
    place.wait(job, "COMPLETED 0:0")
    run, local = place.run("two-nodes"), place.run("local")
    assert_same_weights(run, local)
    ours, theirs = (json.loads(r.summary.read_text()) for r in (run, local))
    assert ours["world_size"] == 4
    assert (ours["val"], ours["test"]) == (theirs["val"], theirs["test"])
    assert "finished" in place.call(BIGBATCH, "runs")


def test_preempted_and_requeued_three_times(place: Place) -> None:
    job = place.submit("preempted", "--nodes", "2", "--ranks-per-node", "2")
    run = place.run("preempted")
    choose = random.Random(seed := time.time_ns())
    print(f"seed {seed}")
    # The first may come before the ranks listen; the last leaves steps to go on with.
    for step in sorted(choose.sample(range(STEPS - 10), 3)):
        place.wait_for_step(job, "preempted", step)
        time.sleep(choose.random())
        place.preempt()
    place.wait(job, "COMPLETED 0:0")

    assert_same_weights(run, place.run("local"))
    assert_every_step_once(run)
    events = read_jsonl(run.events)
    starts = [e["step"] for e in events if e["kind"] == "start"]
    stops = [e["step"] for e in events if e["kind"] == "signal"]
    # A rank that is stopped before it listens has no start of its own to note.
    assert 2 <= len(starts) <= 4
    assert starts == [0, *stops]
    # wandb: one run, each step in it once, over all attempts.
    files = list((run.path / "wandb").glob("offline-run-*/*.wandb"))
    assert len({file.name for file in files}) == 1
    steps = sorted(step for file in files for step in history_steps(file))
    assert steps == list(range(1, STEPS + 1))
    # One output file over all starts.
    assert len(list(run.path.glob("slurm-*.out"))) == 1


def test_two_nodes_are_lost_one_after_the_other(place: Place) -> None:
    """The first with the batch script and rank 0, the second with rank 1."""
    changes = [*CHANGES[:2], "checkpoint.every=5 steps"]
    size = ["--nodes", "2", "--ranks-per-node", "1"]
    job = place.submit("unlucky", *size, changes=changes)
    run, lost, states = place.run("unlucky"), [], set()
    for number, step in enumerate((8, 28)):
        place.wait_for_step(job, "unlucky", step)
        nodes = place.call("squeue", "-h", "-j", job, "-o", "%N").strip()
        lost.append(place.call("scontrol", "show", "hostnames", nodes).split()[number])
        place.cluster.cut_power(lost[-1])
        # What SLURM concludes by itself when the node has not answered for SlurmdTimeout.
        down = [f"nodename={lost[-1]}", "state=down", "reason=power"]
        place.call("scontrol", "update", *down)
        while sum(e["kind"] == "start" for e in read_jsonl(run.events)) < number + 2:
            status = json.loads(place.call(BIGBATCH, "status", "unlucky", "--json"))
            states.add(status["state"])
    place.wait(job, "COMPLETED 0:0")
    assert states <= {"queued", "running"}  # it never counted as ended
    for node in lost:
        place.cluster.start_slurmd(node)
    place.cluster.wait_until_idle()
    assert_same_weights(run, place.run("local"))
    assert_every_step_once(run)
    starts = [e["step"] for e in read_jsonl(run.events) if e["kind"] == "start"]
    assert len(starts) == 3
    assert starts[0] == 0 < starts[1] < starts[2]


def test_a_range_of_nodes_trains_with_what_is_free(place: Place) -> None:
    busy = place.call(
        *("sbatch", "--parsable", "-N", "1", "--exclusive", "--output=/dev/null"),
        "--wrap=sleep 600",
    ).strip()
    place.wait(busy, "RUNNING 0:0")
    job = place.submit("elastic", "--nodes", "1-4", "--ranks-per-node", "1")
    place.wait(job, "COMPLETED 0:0")
    place.call("scancel", busy)
    run = place.run("elastic")
    assert json.loads(run.summary.read_text())["world_size"] == 3
    assert_same_weights(run, place.run("local"))  # reduction: exact


def test_cancelled_it_saves_and_goes_on_when_it_is_resumed(place: Place) -> None:
    job = place.submit("cancelled", "--nodes", "1", "--ranks-per-node", "2")
    run = place.run("cancelled")
    place.wait_for_step(job, "cancelled", 3)
    refused = place.call(BIGBATCH, "resume", "cancelled", status=2)
    assert refused == ""
    assert "finishes its step, saves and ends" in place.call(BIGBATCH, "cancel", "cancelled")
    place.wait(job, "FAILED 75:0")
    status = json.loads(place.call(BIGBATCH, "status", "cancelled", "--json"))
    assert status["state"] == "stopped"
    assert status["checkpoints"] == [f"step-{status['step']:08d}"]
    again = place.call(BIGBATCH, "resume", "cancelled", "--slurm").strip()
    assert "queued" in place.call(BIGBATCH, "runs") or "running" in place.call(BIGBATCH, "runs")
    followed = place.call(BIGBATCH, "logs", "--follow", "cancelled")
    place.wait(again, "COMPLETED 0:0")
    assert f"saved after step {status['step']}; go on with" in followed
    assert all(followed.count(f"--- rank {rank} of 2") == 2 for rank in (0, 1))
    assert f"cancelled {STEPS}/{STEPS} (100%)" in followed
    assert_same_weights(run, place.run("local"))
    assert_every_step_once(run)


def test_each_run_of_an_array_is_alone(place: Place) -> None:
    """One finished, one preempted, one cancelled, and the last ended by scancel.

    The last one to start has the job id of the whole array. Runs of one seed give one result,
    so that the first, undisturbed, is what the third has to become.
    """
    options = ["--array", "0-3", "--vary", "seed=3,4,3,4", "--ranks-per-node", "1"]
    options += ["--sbatch-arg=--exclusive", "--sbatch-arg=--hold"]
    job = place.submit("members", *options, changes=SMALL)
    after = place.submit("after", "--after", "members-0", changes=[*SMALL, "duration=9 steps"])
    place.call(BIGBATCH, "train", "digits", *SMALL, "seed=4", "--run", "four", "--nproc", "1")
    tasks = [f"{job}_{i}" for i in range(4)]
    runs = [place.run(f"members-{i}") for i in range(4)]
    # The job runs the copy: what is changed in there shows, and only there.
    worker = runs[1].path / "code/bigbatch/trainers/worker.py"
    worker.write_text(f"print('from the copy')\n{worker.read_text()}")
    assert place.state(after) == "PENDING 0:0"
    place.call("scontrol", "release", tasks[0])
    place.wait(tasks[0], "COMPLETED 0:0")
    place.call("scontrol", "release", ",".join(tasks[1:]))
    for task, run in zip(tasks[1:], runs[1:], strict=True):
        place.wait_for_step(task, run.name, 1)
    assert place.call("squeue", "-h", "-j", tasks[3], "-o", "%A").strip() == job
    place.call("scancel", tasks[3])
    assert "is not requeued" in place.call(BIGBATCH, "cancel", "members-2")
    place.preempt(tasks[1])
    place.wait(tasks[3], "CANCELLED 75:0")
    place.wait(tasks[2], "FAILED 75:0")
    again = [place.call(BIGBATCH, "resume", run.name, "--slurm").strip() for run in runs[2:]]
    place.call("scontrol", "release", ",".join(again))
    for task in (*again, tasks[1], after):
        place.wait(task, "COMPLETED 0:0")
    assert [place.state(task) for task in tasks] == [
        *("COMPLETED 0:0", "COMPLETED 0:0", "FAILED 75:0", "CANCELLED 75:0")
    ]

    starts = [[e["step"] for e in read_jsonl(r.events) if e["kind"] == "start"] for r in runs]
    ends = [[e["state"] for e in read_jsonl(r.events) if e["kind"] == "end"] for r in runs]
    assert (starts[0], ends[0]) == ([0], ["finished"])
    assert ends[1:] == [["stopped", "finished"]] * 3
    assert all(len(own) == 2 and own[1] > 0 for own in starts[1:])
    for run, reference in zip(runs, ("members-0", "four", "members-0", "four"), strict=True):
        assert_same_weights(run, place.run(reference))
        assert_every_step_once(run)
        assert job_of(run) == [*tasks[:2], *again][runs.index(run)]
    assert "from the copy" in place.call(BIGBATCH, "logs", "members-1")
    assert "from the copy" not in place.call(BIGBATCH, "logs", "members-0")
    names = [info["name"] for info in json.loads(place.call(BIGBATCH, "runs", "m*", "--json"))]
    assert sorted(names) == [run.name for run in runs]

    # A finished run that is started again, by whatever, does nothing.
    before = {path: path.read_bytes() for path in runs[0].path.glob("*.json*")}
    one_more = place.call("sbatch", "--parsable", "--array=0", runs[0].path / "job.sbatch").strip()
    place.call("scontrol", "release", one_more)
    place.wait(f"{one_more}_0", "COMPLETED 0:0")
    assert {path: path.read_bytes() for path in runs[0].path.glob("*.json*")} == before
    place.call(BIGBATCH, "rm", "--yes", "members-0")
    assert not runs[0].path.exists()


def test_the_template_by_hand_on_another_number_of_ranks(place: Place) -> None:
    options = ["--nodes=3", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"]
    output = place.folder / "by-hand.txt"
    job = place.call(
        *("sbatch", "--parsable", f"--output={output}", *options, TEMPLATE, "digits", *CHANGES)
    ).strip()
    place.wait(job, "COMPLETED 0:0")
    run = place.run(f"digits-{job}")
    assert json.loads(run.summary.read_text())["world_size"] == 3
    assert_same_weights(run, place.run("local"))  # reduction: exact


def test_an_end_by_the_users_error_is_not_requeued(place: Place) -> None:
    job = place.submit("broken", "--nodes", "1", "--ranks-per-node", "2", "--sbatch-arg=--hold")
    moved = place.folder / "moved"
    (place.folder / "shards").rename(moved)
    try:
        place.call("scontrol", "release", job)
        place.wait(job, "FAILED 2:0")
    finally:
        moved.rename(place.folder / "shards")
    (output,) = place.run("broken").path.glob("slurm-*.out")
    assert output.read_text().count("data.path shards/digits is no folder here") == 1
    assert "Traceback" not in output.read_text()


def test_a_refused_job(place: Place) -> None:
    command = [BIGBATCH, "submit", "digits", "--run", "refused", "--partition", "nowhere"]
    done = subprocess.run(
        list(map(str, command)),
        cwd=place.folder,
        env=place.cluster.env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "sbatch refused the job" in done.stderr
    assert not place.run("refused").path.exists()
    assert os.listdir(place.folder / "runs")


def test_a_study_as_jobs_stopped_twice_and_gone_on_with(place: Place) -> None:
    """Two good rates, then two hopeless ones, pruned: the seed gives that order.

    The first is preempted as well. Each trial is alone, and what becomes of it is exact.
    """
    (place.folder / "space.yaml").write_text(
        "parameters: {optimizer.lr: {type: choice, choices: [0.01, 0.02, 1e-8, 1e-9]}}"
    )
    options = "--ranks-per-node 2 --cpus-per-rank 1 --no-check --sbatch-arg=--exclusive"
    command = [BIGBATCH, "tune", "digits", "space.yaml", *TRIAL, "--trials", "4", "--parallel", "2"]
    command += ["--sampler", "grid", "--seed", "4", "--pruner", "median", "--startup", "1"]
    runs = [RunDir(place.folder / f"studies/digits/trials/{i:04d}") for i in range(4)]

    # Stopped while two jobs wait. Of one of them no note is left, as after a kill at that moment.
    with begun(place, [*command, "--slurm", f"{options} --sbatch-arg=--hold"]) as search:
        while search.poll() is None and not all(job_of(run) for run in runs[:2]):
            time.sleep(0.1)
        search.send_signal(signal.SIGINT)
        assert search.wait(60) == SAVED
    jobs = [job_of(run) for run in runs[:2]]
    runs[1].events.unlink()
    for job in jobs:
        assert place.state(str(job)) == "PENDING 0:0"
        place.call("scontrol", "release", job)

    # Stopped while both train, at the same time.
    command += ["--slurm", options, "--json"]
    with begun(place, command) as search:
        while search.poll() is None and not all(read_jsonl(run.metrics) for run in runs[:2]):
            time.sleep(0.1)
        search.send_signal(signal.SIGTERM)
        place.preempt(jobs[0])
        stopped = json.loads(search.communicate(timeout=60)[0])
        assert search.returncode == SAVED
    assert [t["state"] for t in stopped["trials"]] == ["running", "running"]
    assert [job_of(run) for run in runs[:2]] == jobs
    for job in jobs:  # so late, the preempted one would be compared with the other, and pruned
        place.wait(str(job), "COMPLETED 0:0")

    found = json.loads(place.call(*command))
    states = ["complete", "complete", "pruned", "pruned"]
    assert [t["state"] for t in found["trials"]] == states
    for run, trial in zip(runs, found["trials"], strict=True):
        events = read_jsonl(run.events)
        assert [e["kind"] for e in events].count("submitted") == 1
        assert [e["kind"] for e in events].count("start") == (2 if run is runs[0] else 1)
        assert run.recipe().optimizer.lr == trial["params"]["optimizer.lr"]
        job = place.call("scontrol", "show", "job", "-o", job_of(run))
        assert f"Command={run.path}/job.sbatch" in job
        ended = "FAILED Reason" if trial["state"] == "pruned" else "COMPLETED Reason"
        assert f"JobState={ended}" in job
        evaluations = [r for r in read_jsonl(run.metrics) if r["kind"] == "eval"]
        if trial["state"] == "complete":
            assert trial["values"] == {"accuracy": evaluations[-1]["accuracy"]}
            assert evaluations[-1]["step"] == STEPS
        else:
            assert 1 <= trial["evaluations"] <= len(evaluations) < STEPS
            assert [e["state"] for e in events if e["kind"] == "end"] == ["stopped"]
            assert list(run.checkpoints.glob("step-????????"))
    # Of each kind the first.
    times = [{e["kind"]: e["time"] for e in read_jsonl(run.events)[::-1]} for run in runs[:2]]
    assert max(t["start"] for t in times) < min(t["end"] for t in times)
    best = max(found["trials"][:2], key=lambda t: t["values"]["accuracy"])
    assert found["best"][0]["overrides"] == [
        *TRIAL,
        f"optimizer.lr={best['params']['optimizer.lr']}",
    ]
    assert f"optimizer.lr={best['params']['optimizer.lr']}" in Path(found["report"]).read_text()

    # Nothing is left to do, and no job was submitted that is not a trial's.
    assert json.loads(place.call(*command))["trials"] == found["trials"]
    known = place.call("scontrol", "show", "job", "-o").splitlines()
    assert sum(f"Command={place.folder}/studies/" in job for job in known) == 4

    # The preempted trial, and a pruned one that is gone on with, as if nothing had happened.
    place.wait(place.call(BIGBATCH, "resume", runs[2].path, "--slurm").strip(), "COMPLETED 0:0")
    for run in (runs[0], runs[2]):
        rate = f"optimizer.lr={run.recipe().optimizer.lr}"
        name = f"trial-{run.name}"
        place.call(BIGBATCH, "train", "digits", *TRIAL, rate, "--run", name, "--nproc", "2")
        assert_same_weights(run, place.run(name))
        assert_every_step_once(run)
