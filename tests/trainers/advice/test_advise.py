"""Advice from run directories and CSV files whose truth is known."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import nn

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.launcher.cli.main import cli
from bigbatch.trainers.advice.advise import (
    Cluster,
    StepTime,
    advise_run,
    choose,
    count_parameters,
    measure_step,
)
from bigbatch.trainers.advice.critical_batch import CostCurve
from bigbatch.trainers.advice.points import advise_points
from bigbatch.trainers.monitoring.history import read_history

ETHERNET = Cluster(bandwidth=12.5e9, latency=20e-6)
NOISE, SIGNALS = 900.0, (3.0, 1.0, 0.5)  # critical batches of 300, 900 and 1800


@pytest.fixture
def run(tmp_path):
    """240 steps of a run with one noise scale in each third, restarted on other ranks."""
    recipe = load_recipe("digits", ["reduction=overlapped", "schedule.cycles=1"])
    run = create_run(tmp_path / "known", recipe)
    rng = np.random.default_rng(0)
    with run.metrics.open("w") as file:
        for step in range(1, 241):
            signal = SIGNALS[(step - 1) // 80]
            micro, large = ((signal + NOISE / n) * (1 + 0.02 * rng.normal()) for n in (64, 256))
            record = {"kind": "train", "step": step, "epoch": step / 4.0, "lr": 1.0}
            record |= {"grad_sq_micro": micro, "grad_norm": math.sqrt(large)}
            print(json.dumps(record | {"step_s": 0.4 if step <= 120 else 0.2}), file=file)
    starts = [{"kind": "start", "step": 0, "world_size": 1, "total_steps": 300}]
    starts += [{"kind": "start", "step": 120, "world_size": 2, "total_steps": 300}]
    run.events.write_text("".join(json.dumps(e) + "\n" for e in starts))
    return run


def advise(run: RunDir, **options):
    return advise_run(run, ETHERNET, parameters=25_000_000, **options)


def test_each_third_of_a_run_has_its_noise_scale(run):
    found = advise(run)
    assert [(p.first_step, p.last_step) for p in found.phases] == [(1, 80), (81, 160), (161, 240)]
    for phase, signal in zip(found.phases, SIGNALS, strict=True):
        low, high = phase.critical_interval
        assert low < NOISE / signal < high
        assert phase.critical == pytest.approx(NOISE / signal, rel=0.1)
    assert found.curve.cost(256) == pytest.approx(300 * 256)


def test_cycles_are_the_phases_of_a_run_that_has_them(run):
    for number, step in enumerate((100, 240), start=1):
        folder = run.snapshots / f"cycle-{number:02d}"
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps({"step": step}))
    names = [(p.name, p.first_step, p.last_step) for p in advise(run).phases]
    assert names == [("cycle 1", 1, 100), ("cycle 2", 101, 240)]
    assert len(advise(run, phases=5).phases) == 5


def test_the_step_time_is_that_of_the_newest_start(run):
    history = read_history(run)
    model, seconds, ranks = measure_step(history, 25_000_000, ETHERNET)
    assert (seconds, ranks) == (0.2, 2)
    assert model.seconds(256, 2) == pytest.approx(0.2)  # four micro-batches on two ranks
    assert model.seconds(256, 4) == pytest.approx(0.1, rel=0.01)
    assert model.seconds(192, 2) == pytest.approx(0.2)  # uneven: one rank has two


def test_what_the_backward_pass_does_not_hide_of_the_all_reduce_adds_to_the_step(run):
    slow = Cluster(bandwidth=1e9, latency=0.0)
    model, _, _ = measure_step(read_history(run), 25_000_000, slow)
    exchange = 2 * (2 - 1) / 2 * 25_000_000 * 4 / 1e9
    assert exchange > model.hiding * model.micro_s
    assert model.seconds(256, 2) == pytest.approx(0.2)
    assert model.micro_s == pytest.approx((0.2 - exchange) / (2 - 2 / 3))
    with pytest.raises(UserError, match=r"all-reduce.*give the true bandwidth"):
        measure_step(read_history(run), 25_000_000, Cluster(bandwidth=1e8, latency=0.0))


def test_ring_all_reduce_by_hand():
    cluster = Cluster(bandwidth=10e9, latency=5e-6)
    assert cluster.all_reduce_s(1e9, 1) == 0
    assert cluster.all_reduce_s(1e9, 4) == pytest.approx(1.5 * 0.1 + 6 * 5e-6)


def test_more_gpus_are_advised_while_they_help_with_batch_and_rate_by_the_rule():
    curve = CostCurve(1e6, 1e6 / 1024, np.tile([1e6, 1e6 / 1024], (10, 1)))
    step = StepTime(64, 0.1, 4e8, 0.0, Cluster(10e9, 0.0))
    for rule, power in (("linear", 1.0), ("sqrt", 0.5)):
        choices = choose(curve, step, 256, 2.0, rule, max_gpus=64, max_batch=10_000)
        assert [c.gpus for c in choices] == [1, 2, 4, 8, 16, 32, 64]
        for c in choices:
            assert c.lr == pytest.approx(2.0 * (c.batch / 256) ** power)
            assert c.batch % (64 * c.gpus) == 0
            assert c.seconds == pytest.approx(
                (1e6 + 1e6 / 1024 * c.batch) / c.batch * step.seconds(c.batch, c.gpus)
            )
        assert all(a.seconds > b.seconds for a, b in pairwise(choices))
    few = choose(curve, step, 256, 2.0, "sqrt", max_gpus=64, max_batch=300)
    assert max(c.batch for c in few) <= 300
    # A network so slow that one GPU is fastest: there is nothing else to advise.
    jam = StepTime(64, 0.1, 4e8, 0.0, Cluster(1e6, 0.0))
    alone = choose(curve, jam, 256, 2.0, "sqrt", max_gpus=64, max_batch=10_000)
    assert [c.gpus for c in alone] == [1]


def test_a_slow_network_is_used_less_often_in_larger_steps():
    curve = CostCurve(1e6, 1e6 / 8192, np.tile([1e6, 1e6 / 8192], (10, 1)))
    fast, slow = (
        choose(
            curve, StepTime(64, 0.1, 4e8, 0.0, Cluster(b, 0.0)), 256, 2.0, "sqrt",
            max_gpus=4, max_batch=100_000,
        )
        for b in (100e9, 2e9)
    )  # fmt: skip
    assert fast[-1].gpus == slow[-1].gpus == 4
    assert slow[-1].batch > fast[-1].batch


def test_parameters_are_counted_without_buffers(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    run = RunDir(tmp_path)
    with pytest.raises(UserError, match=r"no weights to count; give .* --parameters"):
        count_parameters(run)
    (run.checkpoints / "step-00000001").mkdir(parents=True)
    save_file(model.state_dict(), run.checkpoints / "step-00000001" / "model.safetensors")
    assert count_parameters(run) == sum(p.numel() for p in model.parameters())


def test_records_without_norms_or_too_few_are_refused(run):
    with pytest.raises(UserError, match=r"6 usable records in one of 40 phases.*lower --phases"):
        advise(run, phases=40)
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    for line in lines:
        del line["grad_sq_micro"]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match="no recorded gradient norms: train a few dozen steps"):
        advise(run)


def rewrite(run: RunDir, **fields):
    """The run's records with these fields changed, or without them where they are None."""
    lines = [json.loads(line) | fields for line in run.metrics.read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if v is not None} for line in lines]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in kept))


def test_records_that_tell_nothing_are_one_message(run):
    good = run.metrics.read_text()
    rewrite(run, step_s=None)
    with pytest.raises(UserError, match="run known recorded no step time since its newest start"):
        advise(run)
    run.metrics.write_text(good)
    rewrite(run, grad_sq_micro=0.0, grad_norm=0.0)
    with pytest.raises(UserError, match="gradients of steps 1 to 80 are 0"):
        advise(run)
    run.metrics.write_text('garbage\n[]\n{"step": 3}\n{"kind": "eval"}\n' + good)
    assert len(advise(run).phases) == 3


def test_a_run_of_one_micro_batch_is_told_why(run):
    run.recipe_file.write_text(
        run.recipe_file.read_text().replace("micro_batch: 64", "micro_batch: 256")
    )
    with pytest.raises(UserError, match="each of its steps is one micro-batch"):
        advise(run)


def write_points(path, text):
    path.write_text(text)
    return path


def test_points_are_read_fitted_and_held_out(tmp_path):
    rows = "".join(f"{b},9,{20 * (1 + b / 4000)}\n" for b in (4096, 256, 512, 1024, 2048))
    path = write_points(tmp_path / "p.csv", "batch,warmup_epochs,epochs_to_76\n" + rows)
    fit = advise_points(path, (512, 1024))
    assert fit.batch.tolist() == [256, 512, 1024, 2048, 4096]
    assert fit.fitted == [True, False, False, True, True]
    assert fit.unit == "epochs_to_76"
    assert fit.curve.critical == pytest.approx(4000, rel=0.01)
    assert np.abs(fit.errors).max() < 1e-3
    assert np.isnan(fit.left_out_errors).all()  # three points have none to spare
    assert np.abs(advise_points(path).left_out_errors).max() < 1e-3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("size,epochs\n1,2\n", r"has columns \['size', 'epochs'\]; it needs, parted by commas"),
        ("batch,epochs,samples\n1,2,3\n", "exactly one of"),
        ("batch,epochs\n1,2\n2,many\n", r"\['2', 'many'\] is not two numbers above 0"),
        ("batch,epochs\n1,2\n2\n", r"\['2', None\] is not two numbers above 0"),
        ("batch,epochs\n1,-2\n", "is not two numbers above 0"),
        ("batch,epochs\n", "at 0 different batch sizes; .*need at least 3"),
        ("batch,epochs\n256,10\n256,11\n512,12\n", "points at 2 different batch sizes"),
        ("batch,epochs\n1,10,5\n2,11,5\n", "the row of batch 1 has more than the 2 columns"),
        ("batch;epochs\n1;2\n", "needs, parted by commas, exactly one"),
        ("", r"has columns \[\]"),
    ],
)
def test_bad_points_are_one_message(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        advise_points(write_points(tmp_path / "p.csv", text))


def test_files_and_ranges_that_do_not_fit(tmp_path):
    with pytest.raises(UserError, match=r"cannot read --points .*absent.csv"):
        advise_points(tmp_path / "absent.csv")
    path = write_points(tmp_path / "p.csv", "batch,epochs\n1,2\n2,3\n3,4\n")
    with pytest.raises(UserError, match="--hold-out 7:9 names no point"):
        advise_points(path, (7, 9))
    with pytest.raises(UserError, match="at 2 different batch sizes outside --hold-out"):
        advise_points(path, (3, 3))


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path):
    path = write_points(tmp_path / "p.csv", "\ufeffbatch,epochs\n1,2\n2,3\n3,4\n")
    assert advise_points(path).batch.tolist() == [1, 2, 3]


def test_a_poor_fit_says_so(tmp_path):
    falling = write_points(tmp_path / "f.csv", "batch,epochs\n256,40\n512,20\n1024,10\n")
    output = CliRunner().invoke(cli, ["advise", "--points", str(falling)]).output
    assert "the cost does not rise with the batch" in output
    assert "the model misses a fitted point by 100%" in output
    rising = write_points(tmp_path / "r.csv", "batch,epochs\n256,10\n512,11\n1024,13\n")
    output = CliRunner().invoke(cli, ["advise", "--points", str(rising)]).output
    assert "does not rise" not in output
    assert "misses" not in output


def test_the_command_on_a_run(run):
    arguments = ["advise", str(run.path), "--parameters", "1000000", "--target-time", "30s"]
    picture = run.path / "advice.png"
    done = CliRunner().invoke(cli, [*arguments, "--json", "--plot", str(picture)])
    found = json.loads(done.output)
    assert found["target_s"] == 30
    assert found["chosen"]["seconds"] <= 30
    fewer = [c for c in found["choices"] if c["gpus"] < found["chosen"]["gpus"]]
    assert all(c["seconds"] > 30 for c in fewer)
    assert found["lr_rule"] == "sqrt"
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = CliRunner().invoke(cli, arguments).output
    assert f"global_batch={found['chosen']['batch']} optimizer.lr=" in text
    assert "on no number of GPUs" in CliRunner().invoke(cli, [*arguments[:-1], "1s"]).output


def test_the_command_on_points(tmp_path):
    rows = "".join(f"{b},{20 * (1 + b / 4000)}\n" for b in (256, 512, 1024, 2048, 4096))
    path = write_points(tmp_path / "p.csv", "global_batch,epochs\n" + rows)
    arguments = ["advise", "--points", str(path), "--hold-out", "512:1024"]
    picture = tmp_path / "fit.svg"
    done = CliRunner().invoke(cli, [*arguments, "--json", "--plot", str(picture)])
    found = json.loads(done.output)
    assert found["critical_batch"] == pytest.approx(4000, rel=0.01)
    assert [p["held_out"] for p in found["points"]] == [False, True, True, False, False]
    assert "<svg" in picture.read_text()
    assert CliRunner().invoke(cli, arguments).output.count("held out") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name one of a RUN, --points FILE.csv and --transfer"),
        (["a", "--points", "b.csv"], "name one of a RUN, --points FILE.csv and --transfer"),
        (["a", "--plot", "b.txt"], "must end in .png"),
        (["a", "--bandwidth", "0"], "--bandwidth 0 must be above 0"),
        (["a", "--target-time", "soon"], "--target-time 'soon' is no time"),
        (["--points", "b.csv", "--hold-out", "9:1"], "--hold-out '9:1' is not A:B"),
        (["a", "--hold-out", "1:2"], "--hold-out: read for advice from --points"),
        (
            ["--points", "b.csv", "--phases", "2", "--target-time", "1h"],
            "--target-time, --phases: read for advice from a RUN",
        ),
        (["absent"], "no run 'absent'"),
    ],
)
def test_bad_options_are_one_message(arguments, message):
    done = CliRunner().invoke(cli, ["advise", *arguments])
    assert isinstance(done.exception, UserError)
    assert message in str(done.exception)
