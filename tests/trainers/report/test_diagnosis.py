"""The rules of a diagnosis, each on curves made for it, and what they advise."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from bigbatch.configs.load import change_recipe, load_recipe
from bigbatch.configs.schema import Recipe
from bigbatch.trainers.monitoring.history import History
from bigbatch.trainers.report.diagnosis import diagnose, learning
from bigbatch.trainers.report.facts import Facts, gap
from bigbatch.trainers.report.findings import Finding, Turn, choose, say_findings

STEPS = 400
T = np.arange(1, STEPS + 1) / STEPS
COSINE = 0.5 * (1 + np.cos(np.pi * T))
FALLING = 0.1 + 2.2 * np.exp(-8 * T)
NOISE = np.random.default_rng(0).normal(0, 0.02, STEPS)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    changes = ["optimizer={name: sgd, lr: 0.1}", "augment.mixup=0", "augment.affine=null"]
    changes += ["data.sampling=uniform", "loss={name: cross_entropy}"]
    return load_recipe("digits", changes, say=None)


def scores(accuracy: float, nll: float, samples: int) -> dict[str, float]:
    return {"accuracy": accuracy, "nll": nll, "samples": samples}


def probe(step: int, train: float, val: float, nll: float = 0.1, **more: Any) -> dict[str, Any]:
    """One of ten even classes with these accuracies; what is wrong costs 4 nats more."""
    val_nll = nll + 4 * max(0.0, train - val)
    return {
        "kind": "probe", "step": step, "images": 512, "prior_nll": float(np.log(10)),
        "train": scores(train, nll, 512), "val": scores(val, val_nll, 1000), "trained_mean": 500.0,
        "dead": {"act1": 0.0, "act2": 0.1}, "balanced_accuracy": val, "classes": [], **more,
    }  # fmt: skip


def make(recipe: Recipe, loss: Any = FALLING, **more: Any) -> History:
    """A history of 400 steps and 20 evaluations that went well, but for what is given."""
    given = {"step": np.arange(1.0, STEPS + 1), "loss": loss + NOISE, "lr": 0.1 * COSINE}
    train = given | {"grad_norm": np.full(STEPS, 1.0)} | more.pop("train", {})
    step = np.arange(20.0, STEPS + 1, 20)
    accuracy = more.pop("accuracy", lambda t: 0.97 - 0.8 * np.exp(-9 * t))
    nll = more.pop("nll", lambda t: 0.15 + 2 * np.exp(-9 * t))
    val = {"step": step, "accuracy": accuracy(step / STEPS), "nll": nll(step / STEPS)}
    values: dict[str, Any] = {
        "name": "run", "recipe": recipe, "manifest": {}, "train": train, "evals": {"val": val},
        "trust": {}, "ranks": None, "slowest": None, "summary": None, "confusion": None,
        "events": [{"kind": "start", "total_steps": STEPS}], "snapshots": [],
        "probes": [probe(20, 0.5, 0.5, 1.2), probe(400, 0.99, 0.97)],
    }  # fmt: skip
    return History(**values | more)


def norms(step: int, **layers: float | None) -> dict[str, Any]:
    return {"kind": "gradients", "step": step, "norms": layers}


def spike() -> Any:
    return 2.3 + 9 * np.exp(-(((T - 0.2) / 0.08) ** 2))


def classes(recall: float, trained: int) -> list[dict[str, Any]]:
    rare = {"label": 3, "name": "owl\x1b[31m", "recall": recall, "samples": 100, "trained": trained}
    return [rare, {"label": 1, "name": "cat", "recall": 0.9, "samples": 100, "trained": 500}]


STUCK = np.full(STEPS, 2.303)
POOR = [probe(20, 0.1, 0.1, 2.3), probe(400, 0.12, 0.1, 2.29)]
DEAD = {"dead": {"act1": 0.95, "act2": 0.1}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "healthy": ("converged", {}),
    "no probes, as in older runs": ("converged", {"probes": []}),
    "came back": ("diverged", {"loss": 2.3 - 1.8 * np.sin(np.pi * T), "probes": POOR}),
    "rose": ("diverged", {"loss": spike(), "probes": POOR}),
    "first gradient": ("exploding", {
        "loss": STUCK, "probes": POOR, "train": {"grad_norm": np.full(STEPS, 5e4)},
        "gradients": [norms(1, a=1.0, b=4e4, c=None)],
    }),
    "dead": ("dead", {"loss": STUCK, "probes": [POOR[0], POOR[1] | DEAD]}),
    "vanishing": ("vanishing", {
        "loss": STUCK, "probes": POOR,
        "gradients": [norms(1, a=0.0, b=1), norms(20, a=1e-7, b=1), norms(400, a=3e-7, b=1)],
    }),
    "first gradient of norms that start at 0": ("plateau", {
        "loss": STUCK, "probes": POOR, "gradients": [norms(1, a=0.0, b=1)]
    }),
    "other labels": ("mismatch", {
        "probes": [probe(20, 0.1, 0.1), probe(100, 0.7, 0.15), probe(400, 0.99, 0.2)]
    }),
    "rare class": ("starved", {"probes": [probe(400, 0.95, 0.93, classes=classes(0.2, 40))]}),
    "hard class": ("starved", {"probes": [probe(400, 0.95, 0.93, classes=classes(0.2, 500))]}),
    "little but by heart": ("overfitting", {"probes": [probe(20, 0.5, 0.48), probe(400, 1, 0.7)]}),
    "gap": ("gap", {"probes": [probe(20, 0.5, 0.48), probe(400, 1.0, 0.87)]}),
    "gap, and a rise": ("overfitting", {
        "probes": [probe(400, 1.0, 0.87)], "nll": lambda t: 0.4 + 0.3 * abs(t - 0.3)
    }),
    "rise": ("overfitting", {
        "nll": lambda t: 1 + abs(t - 0.3), "accuracy": lambda t: 0.8 - 0.2 * abs(t - 0.3)
    }),
    "rise, without a probe": ("overfitting", {
        "probes": [], "nll": lambda t: 1 + abs(t - 0.3), "accuracy": lambda t: 0.7 + 0 * t
    }),
    "rise at 99 %": ("overconfident", {
        "nll": lambda t: 0.1 + 0.3 * abs(t - 0.3), "accuracy": lambda t: 0.99 + 0 * t
    }),
    "rise of nothing": ("converged", {  # 0.084 over 0.061: of a first run of 99 %
        "nll": lambda t: 0.061 + 0.033 * abs(t - 0.3), "accuracy": lambda t: 0.99 + 0 * t
    }),
    "slow": ("too_slow", {
        "loss": 2.3 - 0.5 * np.cumsum(COSINE) / COSINE.sum(), "probes": [probe(400, 0.5, 0.5, 1.8)]
    }),
    "flat at a high rate": ("plateau", {
        "loss": 0.9 + 1.4 * np.exp(-12 * T), "train": {"lr": np.full(STEPS, 0.5)},
        "probes": [probe(400, 0.8, 0.8, 0.6)],
    }),
    "stuck": ("plateau", {"loss": STUCK, "probes": POOR}),
    "at rest, and poor": ("underfitting", {
        "loss": 1.6 + 0.7 * np.exp(-15 * T), "probes": [probe(400, 0.4, 0.4, 1.6)]
    }),
    "exploded within five steps, and rests at ln C": ("diverged", {
        "loss": np.where(T < 0.2, 1e4, STUCK) - (T < 1.5 / STEPS) * (1e4 - 2.3),
        "probes": [POOR[0], POOR[1] | DEAD],
    }),
    "weak classes of a weak network": ("underfitting", {
        "loss": 1.6 + 0.7 * np.exp(-15 * T),
        "probes": [probe(400, 0.45, 0.45, 1.6, classes=classes(0.0, 500))],
    }),
    "rising to the end": ("improving", {"accuracy": lambda t: 0.5 + 0.45 * t}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_each_rule_holds_for_its_curves_alone(recipe: Recipe, case: str) -> None:
    rule, changes = CASES[case]
    (found,) = learning(make(recipe, **changes))
    assert found.rule == rule
    notes = dict.fromkeys(("overconfident", "improving", "gap"), "note")
    assert found.level == ({"converged": "good"} | notes).get(rule, "problem")
    json.dumps(found.as_dict())  # plain values


def test_what_is_advised_can_be_done(recipe: Recipe) -> None:
    turned = {}
    for case, (_, changes) in CASES.items():
        (found,) = learning(make(recipe, **changes))
        if found.turn is not None:
            assert change_recipe(recipe, [str(found.turn)], say=None) != recipe
            turned[case] = str(found.turn)
    assert turned["rose"] == "optimizer.lr=0.01"
    assert turned["slow"] == "optimizer.lr=0.3"
    assert turned["flat at a high rate"] == "schedule.name=cosine"
    assert turned["rare class"] == "data.sampling=balanced"
    assert turned["gap"] == turned["little but by heart"] == "augment.mixup=0.2"
    assert "hard class" not in turned


def test_a_rate_that_is_suspected_is_tried_beside_the_runs_own(recipe: Recipe) -> None:
    for case, value in (("rose", "0.01"), ("slow", "0.3")):
        (found,) = learning(make(recipe, **CASES[case][1]))
        command = f"`bigbatch whatif run --step 0 --set optimizer.lr={value} --steps 200`"
        assert command in found.text
        origin = {"forked_from": {"run": "runs/trunk", "at": 60}}  # has no step 0
        (found,) = learning(make(recipe, **CASES[case][1], manifest=origin))
        assert "whatif" not in found.text
    (found,) = learning(make(recipe, **CASES["flat at a high rate"][1]))
    assert "whatif" not in found.text


def test_what_the_recipe_refuses_is_not_advised(recipe: Recipe) -> None:
    """Nor what it says already; then nothing is."""
    same = ("optimizer.lr", recipe.optimizer.lr)
    assert choose(recipe, [("augment.flip", 2), ("no.such", 1), same, ("seed", 5)]) == Turn(
        "seed", 5
    )
    assert choose(recipe, [same]) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"probes": [probe(400, 0.99, 0.92)]},  # 7 points: what a network leaves to be had
        {"probes": [probe(400, 0.99, 0.97) | DEAD]},  # it learned all the same
        {"probes": [probe(400, 0.95, 0.93, classes=[classes(0.2, 40)[0] | {"samples": 5}])]},
        {"gradients": [norms(1, a=0.0, b=1.0), norms(400, a=1e-9, b=1.0)]},  # as a bias' may be
        {"train": {"grad_norm": np.full(STEPS, 5e4)}},  # a loss of another scale
        {"loss": 2.3 + 0 * T, "probes": [probe(400, 0.99, 0.97)]},  # mixing keeps a loss high
    ],
)
def test_what_does_no_harm_is_no_problem(recipe: Recipe, changes: dict[str, Any]) -> None:
    assert all(found.level != "problem" for found in learning(make(recipe, **changes)))


def test_few_images_prove_nothing(recipe: Recipe) -> None:
    """20 of 20 and 16 of 20 right may be chance; 500 of 500 and 400 of 500 are none."""
    few = probe(400, 1.0, 0.8) | {"train": scores(1.0, 0.1, 20), "val": scores(0.8, 0.1, 20)}
    (found,) = learning(make(recipe, probes=[few]))
    assert found.rule == "converged"
    assert gap(few)[1] > 3 * gap(probe(400, 1.0, 0.8))[1]


@pytest.mark.parametrize(("trained", "rule"), [(40, "starved"), (500, "converged")])
def test_few_validation_images_do_of_a_rare_class(recipe: Recipe, trained: int, rule: str) -> None:
    """8 of 21 right, clearly below a mean of 93 %: no proof alone, and one with few to learn of."""
    row = classes(8 / 21, trained)[0] | {"samples": 21}
    assert learning(make(recipe, probes=[probe(400, 0.95, 0.93, classes=[row])]))[0].rule == rule


def test_a_rise_by_few_images_is_none(recipe: Recipe) -> None:
    """6 of 60 wrong at best: their number, and with it the loss, is uncertain by 40 %."""
    nll = {"nll": lambda t: 0.3 + 0.15 * abs(t - 0.3), "accuracy": lambda t: 0.9 + 0 * t}
    few = probe(400, 0.97, 0.9)
    few["val"]["samples"] = 60
    assert learning(make(recipe, probes=[few], **nll))[0].rule == "converged"
    assert learning(make(recipe, probes=[probe(400, 0.97, 0.9)], **nll))[0].rule == "overconfident"


def test_what_waits_for_its_turn_has_no_vanished_gradient(recipe: Recipe) -> None:
    """Under gradual transfer the head alone has a norm at first, a stage from its step on."""
    gradients = [norms(1, fc=1.0), norms(20, fc=1.0), norms(400, fc=0.8, layer4=0.1, layer3=0.01)]
    weak = make(recipe, loss=1.6 + 0.7 * np.exp(-15 * T), probes=[probe(400, 0.4, 0.4, 1.6)])
    assert [f.rule for f in learning(replace(weak, gradients=gradients))] == ["underfitting"]


@pytest.mark.parametrize(("step_s", "level"), [(0.02, "note"), (1.0, "problem")])
def test_a_wait_of_seconds_is_no_problem(recipe: Recipe, step_s: float, level: str) -> None:
    """67 % of 400 steps: 5 s, or 268 s."""
    train = {"step_s": np.full(STEPS, step_s), "data_s": np.full(STEPS, 0.67 * step_s)}
    (found,) = [f for f in diagnose(make(recipe, train=train)) if f.rule == "waiting_for_data"]
    assert found.level == level
    assert found.evidence["seconds"] == pytest.approx(0.67 * step_s * STEPS)


def test_the_fit_waits_for_the_end_and_what_is_broken_does_not(recipe: Recipe) -> None:
    events = [{"kind": "start", "total_steps": 1000}]
    (found,) = learning(make(recipe, events=events, probes=[probe(400, 1.0, 0.6)]))
    assert found.rule == "unfinished"
    (found,) = learning(make(recipe, events=events, loss=spike(), probes=POOR))
    assert found.rule == "diverged"
    assert f"`bigbatch replay run --step {found.evidence['step']}` shows what that" in found.text
    over = [*events, {"kind": "end", "state": "finished"}]  # stopped early
    (found,) = learning(make(recipe, events=over, probes=[probe(400, 1.0, 0.6)]))
    assert found.rule == "overfitting"


def test_a_run_that_broke_at_once(recipe: Recipe) -> None:
    """Two records, and an event of the step that ended it."""
    history = make(recipe, events=[{"kind": "non_finite", "step": 2}], probes=[])
    train = {"step": np.arange(1.0, 3), "loss": np.array([3e4, 1e5]), "lr": np.ones(2)}
    train["grad_norm"] = np.array([1e5, 1e6])
    found = learning(replace(history, train=train, evals={}, gradients=[norms(1, a=1e5, b=2.0)]))
    assert [f.rule for f in found] == ["exploding", "non_finite"]
    assert "most of it at a" in found[0].text
    assert "`bigbatch replay run --step 1` from which sample" in found[0].text
    assert "`bigbatch replay run --step 3` shows where it began" in found[1].text
    assert found[1].evidence["replay"] == "bigbatch replay run --step 3"


def test_a_run_whose_first_step_was_not_finite_has_no_record(recipe: Recipe) -> None:
    history = make(recipe, events=[{"kind": "non_finite"}], probes=[])
    (found,) = learning(replace(history, train={}, evals={}))
    assert found.rule == "non_finite"
    (found,) = learning(replace(history, train={}, evals={}, events=[]))
    assert found.rule == "unfinished"


def test_a_loss_scale_that_is_searched_for_is_no_problem(recipe: Recipe) -> None:
    half = recipe.model_copy(update={"precision": "fp16"})
    events = [{"kind": "start", "total_steps": STEPS}, {"kind": "non_finite"}]
    found = learning(make(half, events=events))
    assert [(f.rule, f.level) for f in found] == [("non_finite", "note"), ("converged", "good")]
    (found_32,) = learning(make(recipe, events=events))
    assert (found_32.rule, found_32.level) == ("non_finite", "problem")


@pytest.mark.parametrize("key", ["loss", "lr", "grad_norm"])
def test_records_that_miss_a_column(recipe: Recipe, key: str) -> None:
    history = make(recipe)
    train = {name: column for name, column in history.train.items() if name != key}
    assert learning(replace(history, train=train))


def test_a_class_name_cannot_write_to_the_terminal(recipe: Recipe) -> None:
    found = learning(make(recipe, probes=[probe(400, 0.95, 0.93, classes=classes(0.2, 40))]))
    assert "\x1b" not in found[0].text


def test_lines_at_the_end(recipe: Recipe) -> None:
    """Problems and notes with what to turn; of what went well the verdict alone."""

    def said(findings: list[Finding]) -> str:
        console = Console(file=io.StringIO(), width=1000)
        say_findings(findings, console)
        text: Callable[[], str] = console.file.getvalue  # type: ignore[attr-defined]
        return text()

    good = said(diagnose(make(recipe)))
    assert good.startswith("Converged: ")
    assert good.count("\n") == 1
    bad = said(diagnose(make(recipe, probes=[probe(400, 1.0, 0.6)])))
    assert bad.startswith("Over-fitting: ")
    assert bad.endswith("Try augment.mixup=0.2\n")


def test_learning_rate_time(recipe: Recipe) -> None:
    time = Facts(make(recipe)).time()
    np.testing.assert_allclose(time, np.cumsum(COSINE) / COSINE.sum())
