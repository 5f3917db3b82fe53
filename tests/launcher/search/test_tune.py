"""`bigbatch tune` with real runs of the digits: a study, killed and gone on with, and pruned."""

import json
import signal
import subprocess
import time
from pathlib import Path

import optuna
import pytest
from click.testing import CliRunner
from optuna.trial import TrialState

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import read_jsonl
from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.configs.space import Space
from bigbatch.launcher.child import Children, kill_tree
from bigbatch.launcher.cli.main import cli
from bigbatch.launcher.search import study, tune
from bigbatch.launcher.search import trial as trial_module
from bigbatch.launcher.slurm.submit import note_job
from tests.helpers import warm

pytestmark = pytest.mark.usefixtures("forked")
COMMAND = ["tune", "digits", "space.yaml"]
# A second or two of training, with an evaluation after each step.
SMALL = [
    *("data.image_size=16", "data.workers=0", "schedule={name: constant}"),
    *("global_batch=64", "micro_batch=32"),
    *("optimizer={name: adamw, lr: 0.01}", "evaluate.every=1 steps", "checkpoint.every=2 steps"),
    *("log.wandb=off", "ensemble.soup=false", "reduction=overlapped", "augment.affine=null"),
]
SPACE = """
parameters:
  optimizer.lr: {type: float, low: 1e-3, high: 0.03, log: true}
  loss: {type: choice, choices: [{label_smoothing: 0.0}, {label_smoothing: 0.1}]}
"""


@pytest.fixture
def here(shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "shards").symlink_to(Path(shards) / "shards")
    (tmp_path / "space.yaml").write_text(SPACE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def open_study(
    folder: Path,
    space: Space,
    *,
    trials: int,
    sampler: str = "random",
    pruner: str = "none",
    evaluations: int = 1,
) -> optuna.Study:
    folder.mkdir(exist_ok=True)
    return study.open_study(
        folder,
        space,
        load_recipe("digits"),
        sampler=sampler,
        pruner=pruner,
        seed=0,
        startup=1,
        trials=trials,
        evaluations=evaluations,
    )


@pytest.mark.slow
def test_two_trials_killed_after_the_first_and_gone_on_with(here: Path) -> None:
    command = [*COMMAND, *SMALL, "duration=6 steps", "--trials", "2", "--nproc", "1", "--json"]
    first = here / "studies/digits/trials/0000"
    process = warm.popen(
        warm.bigbatch(*command), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and len(read_jsonl(first / "metrics.jsonl")) < 5:
        time.sleep(0.02)
    kill_tree(process.pid)
    process.wait()
    assert not (first / "summary.json").exists()

    done = warm.run(warm.bigbatch(*command), capture_output=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [t["state"] for t in found["trials"]] == ["complete", "complete"]
    starts = [e for e in read_jsonl(first / "events.jsonl") if e["kind"] == "start"]
    assert len(starts) == 2  # the killed trial went on, with its own rate
    for trial in found["trials"]:
        run = Path(trial["run"])
        last = [r for r in read_jsonl(run / "metrics.jsonl") if r["kind"] == "eval"][-1]
        assert trial["values"]["accuracy"] == last["accuracy"]
        assert (last["split"], last["step"]) == ("val", 6)
        recipe = load_recipe(run / "recipe.yaml")
        assert recipe.optimizer.lr == trial["params"]["optimizer.lr"]
        assert recipe.loss.label_smoothing == trial["params"]["loss"]["label_smoothing"]
    best = max(found["trials"], key=lambda t: t["values"]["accuracy"])
    assert found["best"][0]["number"] == best["number"]
    overrides = found["best"][0]["overrides"]
    assert load_recipe("digits", [*overrides, "log.report=false"]) == load_recipe(
        Path(best["run"]) / "recipe.yaml"
    )
    page = (here / "studies/digits/report.html").read_text()
    # Of the best trial alone a report is drawn, and the page leads to it.
    drawn = [t["number"] for t in found["trials"] if (Path(t["run"]) / "report.html").exists()]
    assert drawn == [best["number"]]
    assert f'<a href="trials/{best["number"]:04d}/report.html">' in page
    assert page.count("data:image/png;base64,") >= 2
    assert (here / "studies/digits/history.png").read_bytes()[:4] == b"\x89PNG"

    # A third start finds nothing left to do; another recipe is refused.
    again = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert json.loads(again.stdout)["trials"] == found["trials"]
    with pytest.raises(UserError, match=r"another recipe: seed = 3 there, 1 here"):
        CliRunner().invoke(cli, [*command, "seed=1"], catch_exceptions=False)


@pytest.mark.slow
def test_a_pruned_trial_is_asked_to_stop_and_saves(here: Path) -> None:
    space = Space.model_validate(
        {"parameters": {"optimizer.lr": {"type": "float", "low": 1e-9, "high": 1e-8}}}
    )
    folder = here / "study"
    found = open_study(folder, space, trials=3, pruner="median", evaluations=400)
    for _ in range(2):  # two good trials: at these rates none can come near
        trial = study.ask(found, space)
        for number in range(1, 400):
            trial.report(0.99, number)
        found.tell(trial, 0.99)
    search = tune.Search(
        "digits",
        (*SMALL, "duration=400 steps"),
        space,
        folder,
        trials=3,
        parallel=1,
        nproc=1,
        slurm=None,
    )
    said: list[str] = []
    tune.run_search(search, found, lambda text, done: said.append(text))
    trial = found.trials[-1]
    assert trial.state == TrialState.PRUNED
    assert "pruned after" in said[0]
    run = tune.run_of(search, trial)
    events = read_jsonl(run.events)
    assert [e["kind"] for e in events if e["kind"] in ("signal", "end")] == ["signal", "end"]
    assert next(e for e in events if e["kind"] == "signal")["signal"] == signal.SIGTERM
    assert list(run.checkpoints.glob("step-????????"))
    assert len(trial.intermediate_values) < 50


def test_values_that_do_not_go_together_are_a_trial_that_failed(here: Path) -> None:
    """Each alone is allowed: micro_batch 256 at a batch of 256, and a batch of 64."""
    space = Space.model_validate(
        {
            "parameters": {
                "micro_batch": {"type": "choice", "choices": [256, 512]},
                "global_batch": {"type": "choice", "choices": [64, 128]},
            }
        }
    )
    folder = here / "study"
    found = open_study(folder, space, trials=9, sampler="grid")
    search = tune.Search(
        "digits", tuple(SMALL), space, folder, trials=9, parallel=2, nproc=1, slurm=None
    )
    tune.run_search(search, found)
    assert len(found.trials) == 4
    assert all(t.state == TrialState.PRUNED for t in found.trials)
    assert all("not a multiple" in t.user_attrs["reason"] for t in found.trials)


@pytest.mark.slow
def test_a_search_whose_trials_all_fail_gives_up(here: Path, monkeypatch) -> None:
    space = Space.model_validate(
        {"parameters": {"optimizer.lr": {"type": "float", "low": 0.1, "high": 1}}}
    )
    folder = here / "study"
    found = open_study(folder, space, trials=9)
    for _ in range(2):
        found.tell(study.ask(found, space), state=TrialState.FAIL)
    overrides = (*SMALL, "duration=2 steps", "model.options={no_such_option: 1}")
    search = tune.Search(
        "digits", overrides, space, folder, trials=9, parallel=1, nproc=1, slurm=None
    )
    with pytest.raises(UserError, match="3 trials failed and none worked"):
        tune.run_search(search, found)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["digits", "none.yaml"], "none.yaml"),
        (["digits", "space.yaml", "optimizer.lrs=1"], "did you mean lr"),
        (["digits", "space.yaml", "--sampler", "grid"], "range without steps"),
        (["digits", "space.yaml", "--nproc", "9"], "9 ranks"),
        (["digits", "space.yaml", "--slurm", "--partition a;b"], "--partition"),
        (["digits", "space.yaml", "--slurm", "--comment='x"], "close each quotation"),
        (["digits", "space.yaml", "--slurm", "--array=0-3"], "each trial is one run"),
    ],
)
def test_mistakes_are_said_before_anything_starts(here: Path, arguments, says) -> None:
    with pytest.raises(UserError, match=says):
        CliRunner().invoke(cli, ["tune", *arguments], catch_exceptions=False)
    assert not list(here.glob("studies/*/trials"))


@pytest.mark.slow
def test_an_orphan_is_waited_for_and_not_started_twice(here: Path) -> None:
    """A run whose search was killed by SIGKILL goes on alone."""
    recipe = load_recipe("digits", [*SMALL, "duration=300 steps"])
    run = create_run(here / "orphan", recipe)
    children = Children(1)
    child = tune.Here(run, children)
    while not any(r["kind"] == "train" for r in read_jsonl(run.metrics)):
        time.sleep(0.05)
    children.close()  # as its end does
    handle = tune._begin_here(recipe, run, children)
    assert isinstance(handle, tune.Elsewhere)
    assert handle.running()
    handle.stop()
    deadline = time.monotonic() + 60
    while handle.running() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not child.running()


def test_trials_side_by_side_share_the_cores(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = Space.model_validate({"parameters": {"seed": {"type": "int", "low": 1, "high": 2}}})
    search = tune.Search("digits", (), space, here, trials=4, parallel=2, nproc=3, slurm=None)
    monkeypatch.setattr(tune.os, "sched_getaffinity", lambda pid: set(range(13)))
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert search.threads is None  # the user's choice stays
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert search.threads == 2
    monkeypatch.setattr(tune.os, "sched_getaffinity", lambda pid: {0})
    assert search.threads == 1


def stand_in(tools: Path, monkeypatch: pytest.MonkeyPatch, **bodies: str) -> None:
    """Programs of SLURM; tests/launcher/slurm/test_slurm_cluster.py has the real ones."""
    tools.mkdir()
    for name, body in bodies.items():
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setattr(trial_module, "_ASK_S", 0.05)


@pytest.mark.slow
def test_a_trial_as_a_job_is_submitted_once_and_waited_for(here: Path, monkeypatch) -> None:
    tools = here / "tools"
    stand_in(
        tools,
        monkeypatch,
        sbatch='echo "$@" >> "$(dirname "$0")/submitted"; echo 4711',
        squeue='if [ -e "$(dirname "$0")/ended" ]; then echo "4711|FAILED|"; '
        'else echo "4711|PENDING|Resources"; fi',
    )
    space = Space.model_validate(
        {"parameters": {"optimizer.lr": {"type": "float", "low": 0.1, "high": 1}}}
    )
    folder = here / "study"

    def open_() -> optuna.Study:
        return open_study(folder, space, trials=1)

    options = ("--gpus-per-node", "2", "--time", "10")
    search = tune.Search(
        "digits", tuple(SMALL), space, folder, trials=1, parallel=1, nproc=1, slurm=options
    )
    # Ctrl-C while it waits: the job stays.
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, 6.0)
    with pytest.raises(tune.Interrupted):
        tune.run_search(search, open_())
    run = tune.run_of(search, open_().trials[0])
    assert [e["job"] for e in read_jsonl(run.events)] == ["4711"]
    script = (run.path / "job.sbatch").read_text()
    assert "#SBATCH --gpus-per-node=2\n" in script
    assert "#SBATCH --time=10\n" in script
    assert run.recipe().optimizer.lr == open_().trials[0].params["optimizer.lr"]

    (tools / "ended").touch()
    tune.run_search(search, open_())
    assert len((tools / "submitted").read_text().splitlines()) == 1
    assert [t.state for t in open_().trials] == [TrialState.FAIL]  # it ended without a result


def test_a_submission_that_was_killed_is_found_in_the_queue_or_made_again(
    here: Path, monkeypatch
) -> None:
    tools = here / "tools"
    stand_in(tools, monkeypatch, squeue='cat "$(dirname "$0")/queue"')
    run = RunDir(here / "trials/0000")
    assert not trial_module.is_submitted(run)
    create_run(run.path, load_recipe("digits"))
    with pytest.raises(UserError, match="cannot ask SLURM"):
        trial_module.is_submitted(run)  # nothing is concluded
    (tools / "queue").write_text(f"9|/x/job.sbatch\n7|{run.path}/job.sbatch\n")
    assert trial_module.is_submitted(run)
    assert [e["job"] for e in read_jsonl(run.events)] == ["7"]
    run.events.unlink()
    (tools / "queue").write_text("9|/x/job.sbatch\n")
    assert not trial_module.is_submitted(run)
    assert not run.path.exists()


def test_a_job_is_waited_for_while_slurm_does_not_answer(here: Path, monkeypatch) -> None:
    """Its files say that it stopped, as those of a preempted job do."""
    tools = here / "tools"
    stand_in(tools, monkeypatch, squeue='cat "$(dirname "$0")/queue"')
    run = create_run(here / "preempted", load_recipe("digits"))
    note_job(run, "7")
    with run.events.open("a") as file:
        file.write('{"kind": "start", "step": 0}\n{"kind": "end", "state": "stopped"}\n')
    handle = trial_module.Elsewhere(run)
    assert handle.running()
    (tools / "queue").write_text("7|COMPLETED|None\n")
    time.sleep(0.06)
    assert not handle.running()


def test_one_search_at_a_time(here: Path) -> None:
    folder = here / "studies/digits"
    folder.mkdir(parents=True)
    with study.acquire_study_lock(folder), pytest.raises(UserError, match="another search"):
        CliRunner().invoke(cli, ["tune", "digits", "space.yaml"], catch_exceptions=False)


def test_what_is_not_the_trials_fault_ends_the_search(here: Path) -> None:
    """Shards that are gone would fail every trial that is still to come."""
    space = Space.model_validate({"parameters": {"seed": {"type": "int", "low": 1, "high": 9}}})
    found = open_study(here / "study", space, trials=9)
    (here / "shards").unlink()
    search = tune.Search(
        "digits", tuple(SMALL), space, here / "study", trials=9, parallel=1, nproc=1, slurm=None
    )
    with pytest.raises(UserError, match="shards/digits"):
        tune.run_search(search, found)
    assert [t.state for t in found.trials] == [TrialState.RUNNING]
