"""The noise scale against a problem whose answer is known, in every way to reduce gradients."""

import json
import math
import os
import random
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from bigbatch.trainers.advice.noise_scale import NoiseScale, asks_for, noise_scale
from bigbatch.trainers.engine.ddp import DdpEngine
from tests.helpers.ranks import run_ranks

MICRO = 8
FEATURES = 20
SIGMA = 0.5  # of the label noise
SCALES = torch.linspace(0.3, 1.5, FEATURES, dtype=torch.float64)  # of the features
OFFSET = torch.linspace(-1, 1, FEATURES, dtype=torch.float64)  # weights minus their optimum


def known_noise_scale() -> float:
    """tr(Sigma) / |G|^2 of the squared loss / 2 with Gaussian features of covariance H.

    G = H d and Sigma = H d d' H + (d' H d + sigma^2) H, by Isserlis' theorem.
    """
    h = SCALES**2
    signal = float((h * OFFSET).square().sum())
    error = float((h * OFFSET.square()).sum()) + SIGMA**2
    return (signal + error * float(h.sum())) / signal


def draw(step: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and residual targets of one micro-batch; the optimal weights are zero."""
    generator = torch.Generator().manual_seed(1000 * step + number)
    x = torch.randn(MICRO, FEATURES, generator=generator) * SCALES.float()
    return x, SIGMA * torch.randn(MICRO, 1, generator=generator)


def linear_model() -> nn.Module:
    model = nn.Linear(FEATURES, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(OFFSET.float())
    return model


def measure(reduction: str, micro_batches: int, steps: int) -> dict[str, list[float]]:
    """Squared norms and noise scales of `steps` steps at fixed weights, by the real engine."""
    engine = DdpEngine("fp32", reduction)
    model = linear_model()
    engine.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0), micro_batches)
    noise = NoiseScale(MICRO, MICRO * micro_batches)
    mine = range(engine.rank, micro_batches, engine.world)
    found: dict[str, list[float]] = {"micro": [], "norm": [], "scale": []}
    for step in range(steps):
        engine.zero_grad()
        for number in mine:
            x, y = draw(step, number)
            with engine.micro_batch(last=number == mine[-1]):
                engine.backward((engine.model(x) - y).square().mean() / 2)
        engine.reduce()
        micro = float(engine.sum(engine.micro_batch_sq())) / engine.micro_batches_measured
        norm = float(engine.gradient_norm())
        found["micro"].append(micro)
        found["norm"].append(norm)
        found["scale"].append(noise.update(micro, norm).get("noise_scale", math.nan))
    return found


def gradients(step: int, micro_batches: int) -> torch.Tensor:
    """Each micro-batch's gradient [micro_batches, FEATURES], from its formula."""
    rows = []
    for number in range(micro_batches):
        x, y = draw(step, number)
        rows.append((x * (x @ OFFSET.float()[:, None] - y)).mean(0))
    return torch.stack(rows)


def check_against_formula(
    found: dict[str, list[float]], reduction: str, world: int, micro_batches: int
) -> None:
    """The mean over all micro-batches (exact), or over the first of each rank."""
    for step, (micro, norm) in enumerate(zip(found["micro"], found["norm"], strict=True)):
        each = gradients(step, micro_batches)
        seen = each if reduction == "exact" else each[:world]
        assert micro == pytest.approx(float(seen.square().sum(1).mean()), rel=1e-5)
        assert norm == pytest.approx(float(each.mean(0).norm()), rel=1e-5)


@pytest.mark.parametrize("reduction", ["exact", "overlapped"])
def test_the_noise_scale_of_linear_regression_is_found_within_a_tenth(reduction):
    steps = 800
    found = measure(reduction, 4, steps)
    check_against_formula(found, reduction, 1, 4)
    noise = sum(found["micro"]) / steps - sum(n**2 for n in found["norm"]) / steps
    signal = (4 * sum(n**2 for n in found["norm"]) - sum(found["micro"])) / (3 * steps)
    scale = noise / (1 / MICRO - 1 / (4 * MICRO)) / signal
    assert scale == pytest.approx(known_noise_scale(), rel=0.1)
    assert sorted(found["scale"])[steps // 2] == pytest.approx(known_noise_scale(), rel=0.1)


CASES = [("exact", 4), ("overlapped", 3), ("overlapped", 4), ("overlapped", 7)]


@pytest.mark.slow
def test_three_ranks_measure_single_micro_batches_also_inside_the_all_reduce(tmp_path):
    run_ranks(3, Path(__file__), tmp_path / "found.json")
    for case, found in json.loads((tmp_path / "found.json").read_text()):
        check_against_formula(found, case[0], 3, case[1])


def test_a_step_that_is_not_finite_is_recorded_and_not_averaged():
    noise, undisturbed = NoiseScale(8, 32), NoiseScale(8, 32)
    for n in (noise, undisturbed):
        n.update(3.0, 1.2)
    assert noise.update(math.inf, math.nan)["grad_sq_micro"] == math.inf
    assert noise.update(2.5, 1.1) == undisturbed.update(2.5, 1.1)


def test_where_no_signal_stands_out_there_is_no_scale():
    recorded = NoiseScale(8, 32).update(4.0, 1.0)  # as of pure noise: |g|^2 falls as 1 / B
    assert math.isnan(recorded["noise_scale"])


def test_averages_go_on_where_the_batch_changes_and_where_a_run_is_resumed():
    """Norms as expected at |G|^2 = 2 and tr(S) = 600: any batch gives the scale 300, from the first
    step of two micro-batches on; steps of one are left out. Independent: weights 0.99^k."""
    kept: list[float] = [0.0, 0.0]
    noise = NoiseScale(8, 8, kept)
    values, rng = [], random.Random(0)
    for step, batch in enumerate([8, 8, 16, 16, 64, 64, 64, 16, 256]):
        wobble = rng.uniform(0.9, 1.1)
        signal, spread = 2 * wobble, 600 / wobble
        record = noise.update(signal + spread / 8, math.sqrt(signal + spread / batch), batch)
        if batch == 8:
            assert record == {}
            continue
        values.append((spread, signal))
        weights = [0.99**k for k in range(len(values))][::-1]
        n, s = (sum(w * v[i] for w, v in zip(weights, values, strict=True)) for i in (0, 1))
        assert record["noise_scale"] == pytest.approx(n / s, rel=1e-9)
        if step == 5:  # another process goes on from what a checkpoint holds
            kept = list(kept)
            noise = NoiseScale(8, 8, kept)
    assert noise_scale(*kept) == record["noise_scale"]
    assert math.isnan(noise_scale(0.0, 0.0))


@pytest.mark.parametrize(
    ("noise", "signal", "asks"),
    [
        (640.0, 10.0, True),
        (639.0, 10.0, False),
        (5.0, -1.0, True),
        (-5.0, -1.0, False),
        (0, 0, False),
    ],
)
def test_a_batch_is_asked_for_by_the_noise_scale(noise: float, signal: float, asks: bool) -> None:
    assert asks_for(32, 0.5, noise, signal) == asks


def test_steps_of_one_micro_batch_have_nothing_to_compare():
    assert NoiseScale(32, 32).update(1.0, 1.0) == {}


def main() -> None:
    """A rank of the test with three."""
    results = [(case, measure(*case, steps=3)) for case in CASES]
    if os.environ["RANK"] == "0":
        with open(sys.argv[1], "w") as file:
            json.dump(results, file)
    torch.distributed.barrier()  # leave together
    torch.distributed.destroy_process_group()
    # Interpreters with torch's threads now and then abort on their way out, all work done.
    os._exit(0)


if __name__ == "__main__":
    main()
