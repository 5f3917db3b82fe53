"""Losses against their formulas in float64, label by label, and against other libraries."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from sklearn.datasets import load_digits
from timm.loss import BinaryCrossEntropy
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from bigbatch.configs.durations import Length
from bigbatch.configs.errors import UserError
from bigbatch.configs.load import load_recipe
from bigbatch.configs.losses import Loss
from bigbatch.trainers.losses.build import Course, build_loss, build_objective
from bigbatch.trainers.losses.priors import ClassCounts, class_weights
from bigbatch.trainers.planning.plan import make_plan
from tests.trainers.losses.test_targets import CASES as TARGET_CASES

ADAPTER: TypeAdapter[Any] = TypeAdapter(Loss)
CLASSES, SCALE = 5, 16.0
COUNTS = ClassCounts("abcde", [500, 100, 40, 7, 1])
COSTS = [[0.0, 1, 2, 3, 4], [1, 0, 1, 9, 1], [5, 5, 0, 5, 5], [1, 2, 3, 0, 1], [0, 0, 0, 0, 0]]

Label = Callable[[Tensor, int], Tensor]  # logits [C] and a label -> its loss


def log_p(z: Tensor) -> Tensor:
    return z - z.exp().sum().log()


def others(z: Tensor, c: int) -> Tensor:
    return torch.cat([z[:c], z[c + 1 :]])


def yes_or_no(z: Tensor, c: int) -> list[tuple[Tensor, bool]]:
    """The sigmoid's probability of what is so, for each class, and whether it is there."""
    return [(1 / (1 + (-x if k == c else x).exp()), k == c) for k, x in enumerate(z)]


def smoothed(label: Label, share: float) -> Label:
    return lambda z, c: (
        (1 - share) * label(z, c) + share / len(z) * sum(label(z, k) for k in range(len(z)))
    )


def cross_entropy(z: Tensor, c: int) -> Tensor:
    return -log_p(z)[c]


def hinge(z: Tensor, c: int) -> Tensor:
    return torch.relu(1 + others(z, c).max() - z[c])


def ldam(z: Tensor, c: int) -> Tensor:
    margin = 0.7 * (1 / COUNTS.samples[c]) ** 0.25  # the rarest class has one sample
    return torch.log(1 + (others(z, c) - z[c] + margin).exp().sum())


def lowered(z: Tensor, c: int, logit: Tensor) -> Tensor:
    """Cross-entropy with another logit for the label."""
    return torch.log(1 + (others(z, c) - logit).exp().sum())


def arcface(z: Tensor, c: int) -> Tensor:
    angle = torch.acos(z[c] / SCALE)
    if angle > math.pi - 0.4:
        return lowered(z, c, z[c] - SCALE * 0.4 * math.sin(0.4))
    return lowered(z, c, SCALE * torch.cos(angle + 0.4))


# A recipe's loss, and its value for logits of one sample and its label. Those of the last group
# take one label for each sample.
CASES: dict[str, tuple[dict[str, Any], Label]] = {
    "cross-entropy": ({"name": "cross_entropy"}, cross_entropy),
    "label smoothing (Szegedy et al. 2016, section 7)": (
        {"name": "cross_entropy", "label_smoothing": 0.1},
        smoothed(cross_entropy, 0.1),
    ),
    "poly-1 (Leng et al. 2022, equation 6)": (
        {"name": "poly1", "epsilon": 2.0},
        lambda z, c: -log_p(z)[c] + 2.0 * (1 - log_p(z)[c].exp()),
    ),
    "bce": (
        {"name": "bce", "pos_weight": 3.0},
        lambda z, c: -sum((3 if there else 1) * p.log() for p, there in yes_or_no(z, c)),
    ),
    "bce, mean over classes, smoothed": (
        {"name": "bce", "over_classes": "mean", "label_smoothing": 0.2},
        smoothed(lambda z, c: -sum(p.log() for p, _ in yes_or_no(z, c)) / len(z), 0.2),
    ),
    "focal, sigmoid (Lin et al. 2017, equation 5)": (
        {"name": "focal_sigmoid", "gamma": 1.5, "alpha": 0.3},
        lambda z, c: (
            -sum((0.3 if there else 0.7) * (1 - p) ** 1.5 * p.log() for p, there in yes_or_no(z, c))
        ),
    ),
    "focal, softmax": (
        {"name": "focal_softmax", "gamma": 0.5},
        lambda z, c: -((1 - log_p(z)[c].exp()) ** 0.5) * log_p(z)[c],
    ),
    "hinge (Crammer and Singer 2001)": ({"name": "hinge"}, hinge),
    "ramp (Collobert et al. 2006, equation 4)": (
        {"name": "ramp", "s": -0.5},
        lambda z, c: hinge(z, c) - torch.relu(-0.5 - z[c] + others(z, c).max()),
    ),
    "cost matrix": (
        {"name": "expected_cost", "cost_matrix": COSTS},
        lambda z, c: sum(cost * p for cost, p in zip(COSTS[c], log_p(z).exp(), strict=True)),
    ),
    "cost vector": (
        {"name": "expected_cost", "cost_vector": [1, 2, 3, 4, 5]},
        lambda z, c: (c + 1) * (1 - log_p(z)[c].exp()),
    ),
    "confusion cost, before an evaluation": (
        {"name": "confusion_cost", "share": 0.7},
        lambda z, c: 1 - log_p(z)[c].exp(),
    ),
    "logit adjustment (Menon et al. 2021, equation 10)": (
        {"name": "logit_adjusted", "tau": 1.5},
        lambda z, c: torch.log(
            1
            + sum(
                (COUNTS.samples[k] / COUNTS.samples[c]) ** 1.5 * (z[k] - z[c]).exp()
                for k in range(len(z))
                if k != c
            )
        ),
    ),
    "class weights: n^-1": (
        {"name": "cross_entropy", "class_weights": "balanced", "label_smoothing": 0.3},
        lambda z, c: 648 / 5 / COUNTS.samples[c] * smoothed(cross_entropy, 0.3)(z, c),
    ),
    "LDAM (Cao et al. 2019, equation 13)": ({"name": "ldam", "max_margin": 0.7}, ldam),
    "ArcFace (Deng et al. 2019, equation 3)": ({"name": "arcface", "margin": 0.4}, arcface),
    "CosFace (Wang et al. 2018, equation 4)": (
        {"name": "cosface", "margin": 0.3},
        lambda z, c: lowered(z, c, z[c] - SCALE * 0.3),
    ),
}
ONE_LABEL = ("ldam", "arcface", "cosface")


class Net(nn.Module):
    """A classifier of four features; of a cosine head, the losses look at its scale alone."""

    def __init__(self, bias: bool = True, scale: float | None = None) -> None:
        super().__init__()
        self.fc = nn.Linear(4, CLASSES, bias=bias)
        if scale is not None:
            self.fc.scale = scale  # type: ignore[assignment]

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(x)
        return out


def built(config: dict[str, Any], course: Course | None = None) -> Any:
    model = Net(scale=SCALE) if config["name"] in ("arcface", "cosface") else None
    return build_loss(ADAPTER.validate_python(config), model, COUNTS, course)


def batch(rows: int = 24, mixed: bool = True) -> tuple[Tensor, Tensor]:
    """Logits [B, C] of which some are far apart, and targets [B, C]: hard, mixed and even."""
    generator = torch.Generator().manual_seed(0)
    logits = 6 * torch.randn(rows, CLASSES, generator=generator, dtype=torch.float64)
    logits.clamp_(-SCALE + 0.1, SCALE - 0.1)
    logits[1, 1] = 0.1 - SCALE  # of a cosine head, as far from its label as can be
    hard = torch.eye(CLASSES, dtype=torch.float64)[torch.arange(rows) % CLASSES]
    share = torch.linspace(0, 1, rows, dtype=torch.float64)[:, None]
    targets = share * hard + (1 - share) * hard.roll(1, 0)
    targets[-1] = 1 / CLASSES
    return logits.requires_grad_(), targets if mixed else hard


def test_every_name_in_the_schema_is_tested_here() -> None:
    forms = ADAPTER.json_schema()["$defs"].values()
    names = [form["properties"]["name"] for form in forms]
    expected = {name for form in names for name in form.get("enum") or [form["const"]]}
    tested = {config["name"] for config, _ in CASES.values()} | {"large_margin", "center", "jsd"}
    tested |= TARGET_CASES.keys()
    assert tested == expected - {"balanced", "effective_number", "given"}


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient_are_those_of_the_formula(case: str) -> None:
    """A mixed sample's loss is the mean of its labels', by their shares."""
    config, label = CASES[case]
    logits, targets = batch(mixed=config["name"] not in ONE_LABEL)
    loss = built(config)(logits, targets)
    (gradient,) = torch.autograd.grad(loss, logits)
    expected = sum(
        share * label(row, c)
        for row, shares in zip(logits, targets, strict=True)
        for c, share in enumerate(shares)
    ) / len(logits)
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-11)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_slopes_and_finite_far_out(case: str) -> None:
    config, _ = CASES[case]
    loss = built(config)
    logits, targets = batch(7, mixed=config["name"] not in ONE_LABEL)
    assert torch.autograd.gradcheck(lambda z: loss(z / 6, targets), logits)
    far = logits.detach().float().requires_grad_()
    if config["name"] not in ("arcface", "cosface"):
        far = (50 * far.detach()).requires_grad_()
    loss(far, targets.float()).backward()
    assert far.grad is not None
    assert far.grad.isfinite().all()


@pytest.mark.parametrize("case", CASES)
def test_who_listens_hears_each_sample_and_changes_no_bit(case: str) -> None:
    config, label = CASES[case]
    logits, targets = batch(mixed=config["name"] not in ONE_LABEL)
    course = Course(listens=True)
    loss, plain = built(config, course)(logits, targets), built(config)(logits, targets)
    assert torch.equal(loss, plain)
    assert torch.equal(*(torch.autograd.grad(value, logits)[0] for value in (loss, plain)))
    assert course.heard is not None
    assert torch.equal(course.heard.logits, logits)
    assert not course.heard.losses.requires_grad
    expected = [
        sum(share * label(row, c) for c, share in enumerate(shares)).item()
        for row, shares in zip(logits.detach(), targets, strict=True)
    ]
    assert course.heard.losses.tolist() == pytest.approx(expected, rel=1e-9)


def test_the_default_is_plain_cross_entropy() -> None:
    logits, targets = batch()
    plain = build_loss(ADAPTER.validate_python({}))(logits, targets)
    assert torch.equal(plain, F.cross_entropy(logits, targets))


def test_other_libraries_agree_on_labels() -> None:
    logits, targets = batch(mixed=False)
    labels = targets.argmax(1)
    focal = sigmoid_focal_loss(logits, targets, reduction="sum") / len(logits)
    torch.testing.assert_close(built({"name": "focal_sigmoid"})(logits, targets), focal)
    for over, in_timm in (("sum", True), ("mean", False)):
        theirs = BinaryCrossEntropy(0.1, sum_classes=in_timm)(logits, labels)
        ours = built({"name": "bce", "label_smoothing": 0.1, "over_classes": over})
        torch.testing.assert_close(ours(logits, targets), theirs)
    weights = class_weights(
        ADAPTER.validate_python({"class_weights": "balanced"}).class_weights, COUNTS
    )
    theirs = F.cross_entropy(logits, labels, weight=weights, reduction="sum") / len(logits)
    ours = built({"name": "cross_entropy", "class_weights": "balanced"})
    torch.testing.assert_close(ours(logits, targets), theirs)


def test_a_threshold_counts_both_of_a_mixture_as_timm_does() -> None:
    logits, targets = batch()
    theirs = BinaryCrossEntropy(0.0, target_threshold=0.2)(logits, targets)
    ours = built({"name": "bce", "over_classes": "mean", "target_threshold": 0.2})
    torch.testing.assert_close(ours(logits, targets), theirs)
    mixture = torch.tensor([[0.7, 0.3, 0, 0, 0]], dtype=torch.float64)
    sure = torch.tensor([[9.0, 9.0, -9.0, -9.0, -9.0]], dtype=torch.float64)
    assert ours(sure, mixture) < 1e-3


# The weights of classes.


def test_weights_and_smoothing_together_learn_the_right_class() -> None:
    """pytorch #104776: torch's weighted and smoothed loss is least at the heavy class for all."""
    weights = [1.0, 1.0, 1.0, 1.0, 200.0]
    label = torch.eye(CLASSES, dtype=torch.float64)[:1]

    def best(loss: Callable[[Tensor], Tensor]) -> int:
        z = torch.zeros(1, CLASSES, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([z], max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = loss(z)
            value.backward()
            return value

        optimizer.step(closure)
        return int(z.argmax())

    given = torch.tensor(weights, dtype=torch.float64)
    assert best(lambda z: F.cross_entropy(z, label, weight=given, label_smoothing=0.1)) == 4
    ours = built({"name": "cross_entropy", "label_smoothing": 0.1, "class_weights": weights})
    assert best(lambda z: ours(z, label)) == 0


@pytest.mark.parametrize(
    "config", ["balanced", {"name": "effective_number", "beta": 0.99}, [3, 1, 4, 1, 5]]
)
def test_weights_have_mean_one_over_the_training_samples(config: Any) -> None:
    part = ADAPTER.validate_python({"class_weights": config}).class_weights
    weights = class_weights(part, COUNTS)
    relative = {
        "balanced": lambda c, n: 1 / n,
        "effective_number": lambda c, n: 0.01 / (1 - 0.99**n),
        "given": lambda c, n: [3, 1, 4, 1, 5][c],
    }[part.name]
    expected = [relative(c, n) for c, n in enumerate(COUNTS.samples)]
    scale = 648 / sum(w * n for w, n in zip(expected, COUNTS.samples, strict=True))
    torch.testing.assert_close(weights.tolist(), [scale * w for w in expected])
    absent = class_weights(part, ClassCounts("abcde", [5, 0, 1, 1, 1]))
    assert absent.isfinite().all()
    assert (absent[1] == 0) == (part.name != "given")


def test_jsd_is_augmixs() -> None:
    """Equations 2 and 3, sample by sample, with probabilities in place of their logarithms."""
    views, targets = batch(24)[0].detach(), batch(8)[1]
    loss = build_loss(ADAPTER.validate_python({"name": "jsd", "weight": 5}), None, None)
    expected = []
    for i in range(8):
        p = [log_p(views[8 * view + i]).exp() for view in range(3)]
        mean = sum(p) / 3
        js = sum((q * (q / mean).log()).sum() for q in p) / 3
        expected.append(-(targets[i] * p[0].log()).sum() + 5 * js)
    torch.testing.assert_close(loss(views, targets), torch.stack(expected).mean())
    logits = (views / 8).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, targets), logits)
    same = views[:8].repeat(3, 1)
    plain = build_loss(ADAPTER.validate_python({}))
    torch.testing.assert_close(loss(same, targets), plain(views[:8], targets))
    by_parts = [
        loss(views.view(3, 8, -1)[:, part].flatten(0, 1), targets[part])
        for part in (slice(0, 2), slice(2, 8))
    ]
    whole = (2 * by_parts[0] + 6 * by_parts[1]) / 8  # micro-batches do not matter
    torch.testing.assert_close(whole, loss(views, targets))


DRW = {"name": "ldam", "class_weights": {"name": "effective_number", "beta": 0.9999}}


def test_weights_that_are_deferred_count_from_their_step_on() -> None:
    """Cao et al. 2019, algorithm 1: LDAM, then LDAM by effective numbers of samples."""
    logits, targets = batch(mixed=False)
    labels = targets.argmax(1).tolist()
    losses = torch.stack([ldam(z, c) for z, c in zip(logits, labels, strict=True)])
    course = Course(weights_from=160)
    drw = build_loss(ADAPTER.validate_python(DRW | {"max_margin": 0.7}), None, COUNTS, course)
    for course.step in (0, 159):
        torch.testing.assert_close(drw(logits, targets), losses.mean())
    raw = [(1 - 0.9999) / (1 - 0.9999**n) for n in COUNTS.samples]
    scale = 648 / sum(w * n for w, n in zip(raw, COUNTS.samples, strict=True))
    weights = torch.tensor([scale * raw[c] for c in labels], dtype=torch.float64)
    for course.step in (160, 200):
        torch.testing.assert_close(drw(logits, targets), (weights * losses).mean())
        assert torch.autograd.gradcheck(lambda z: drw(z, targets), logits)


def test_weights_that_would_never_count_are_refused() -> None:
    loss = "loss={name: ldam, class_weights: balanced, class_weights_from: 60 epochs}"
    recipe = load_recipe("digits", [loss, PLAIN, "data.sampling=uniform"], say=None)
    with pytest.raises(UserError, match="class weights would never count"):
        make_plan(recipe, 1078)
    half = recipe.loss.model_copy(update={"class_weights_from": Length(30, "epochs")})
    assert make_plan(recipe.model_copy(update={"loss": half}), 1078).weights_from == 127


@pytest.mark.parametrize("case", CASES)
def test_how_samples_are_batched_does_not_matter(case: str) -> None:
    """Means of micro-batches of any size, by size, are the mean of all, and so over ranks."""
    config, _ = CASES[case]
    loss = built(config)
    logits, targets = batch(mixed=config["name"] not in ONE_LABEL)
    (whole,) = torch.autograd.grad(loss(logits, targets), logits)
    for size in (1, 3, 8):
        parts = zip(logits.split(size), targets.split(size), strict=True)
        total = sum(loss(z, t) * size / len(logits) for z, t in parts)
        (gradient,) = torch.autograd.grad(total, logits)
        torch.testing.assert_close(gradient, whole, rtol=1e-10, atol=1e-15)


# Large-margin softmax, which looks at the classifier.


@pytest.mark.parametrize("margin", [2, 3, 4])
@pytest.mark.parametrize("share", [0.0, 0.25])
def test_large_margin_is_lius(margin: int, share: float) -> None:
    torch.manual_seed(margin)
    net = Net(bias=margin % 2 == 0).double()
    x, labels = 3 * torch.randn(40, 4, dtype=torch.float64), torch.arange(40) % CLASSES
    with torch.no_grad():
        x[-1] = -net.fc.weight[int(labels[-1])]  # straight away from its class
    config = {"name": "large_margin", "margin": margin, "plain_share": share}
    objective = build_objective(ADAPTER.validate_python(config), net, COUNTS)
    targets = torch.eye(CLASSES, dtype=torch.float64)[labels]
    expected = 0.0
    weight = net.fc.weight.tolist()
    bias = [0.0] * CLASSES if net.fc.bias is None else net.fc.bias.tolist()
    for row, label in zip(x.tolist(), labels.tolist(), strict=True):
        f = [
            sum(a * b for a, b in zip(w, row, strict=True)) + b
            for w, b in zip(weight, bias, strict=True)
        ]
        length = math.hypot(*row) * math.hypot(*weight[label])
        angle = math.acos(max(-1.0, min(1.0, (f[label] - bias[label]) / length)))
        k = min(int(angle * margin / math.pi), margin - 1)
        psi = (-1) ** k * math.cos(margin * angle) - 2 * k
        f[label] = length * (share * math.cos(angle) + (1 - share) * psi) + bias[label]
        expected += (math.log(sum(map(math.exp, f))) - f[label]) / len(x)
    assert objective(net, x, targets).item() == pytest.approx(expected, rel=1e-9)
    x = x[:6].requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: objective(net, x, targets[:6]), (x, net.fc.weight))
    plain = F.cross_entropy(net(x), targets[:6])
    harder = objective(net, x, targets[:6]) - plain
    assert harder > 0.01 if margin > 1 else abs(harder) < 1e-12


def test_ldam_margins_are_cosines_of_a_cosine_head() -> None:
    config = ADAPTER.validate_python({"name": "ldam"})
    logits, targets = batch(mixed=False)
    ours = build_loss(config, Net(scale=SCALE), COUNTS)(logits, targets)
    larger = config.model_copy(update={"max_margin": 0.5 * SCALE})
    torch.testing.assert_close(ours, build_loss(larger, Net(), COUNTS)(logits, targets))


def test_a_classifier_that_is_not_one_linear_layer_is_refused() -> None:
    config = ADAPTER.validate_python({"name": "large_margin"})
    with pytest.raises(UserError, match="large_margin needs a model whose logits are one linear"):
        build_loss(config, nn.Sequential(nn.Conv2d(2, 2, 1)), COUNTS)


# What cannot be asked together.

MIXED, PLAIN = "augment.mixup=0.2", "augment.mixup=0"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["loss={name: ldam}", MIXED], "loss ldam gives one class .* set augment.mixup to 0"),
        (["loss={name: large_margin}", MIXED], "loss large_margin gives one class"),
        (["loss={name: center}", MIXED], "loss center gives one class"),
        (["loss={name: bce, target_threshold: 0.2}", PLAIN], "mixed images alone.* drop it"),
        (["loss={name: bce, target_threshold: 0.2, label_smoothing: 0.1}"], "does nothing; drop"),
        (["loss={name: bce, target_threshold: 0.2, class_weights: balanced}"], "drop one of them"),
        (["loss={name: expected_cost}"], "give either cost_vector or cost_matrix"),
        (["loss={name: expected_cost, cost_matrix: [[0, 1], [1]]}"], "give each class a row"),
        (["loss.class_weights=balanced", "data.sampling=balanced"], "rare ones would count twice"),
        (["loss={name: logit_adjusted}", "data.sampling=balanced"], "rare ones would count twice"),
        (["loss.class_weights=rare"], "class_weights.*balanced, effective_number, given"),
        (["loss={name: hinge, label_smoothing: 0.1}"], "label_smoothing: unknown key"),
        (["loss={name: arcface}", PLAIN], "set model.head={name: cosine, scale: 64}"),
        (["loss={name: large_margin, margin: 1}", PLAIN], "margin 1 leaves the angle as it is"),
        (["loss.class_weights={name: effective_number, beta: 0}"], "beta 0 weighs all classes al"),
        (["loss={name: ldam, class_weights_from: 9 epochs}", PLAIN], "and there are none; set"),
        (["loss={name: jsd}", PLAIN], "augment.ops has no augmix; put one augmix at its end"),
        (["loss={name: jsd}", PLAIN, "augment.ops=[augmix, erasing]"], "augmix not once, and last"),
        (["loss={name: jsd}", MIXED, "augment.ops=[augmix]"], "jsd compares views of one image"),
        (["loss={name: focal}"], "focal_sigmoid, focal_softmax"),
    ],
)
def test_contradictions_are_refused_with_the_remedy(overrides: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        load_recipe("digits", overrides)


def test_a_stream_has_no_classes_to_count() -> None:
    stream = ["data.stream=['shards/*.tar']", "data.sampling=uniform", "duration=9 steps"]
    rest = ["evaluate.every=3 steps", "checkpoint.every=3 steps", PLAIN]
    with pytest.raises(UserError, match="confusion_cost goes by the classes of an index"):
        load_recipe("digits", [*stream, *rest, "loss={name: confusion_cost}"])
    for loss in ("{name: ldam}", "{class_weights: balanced}", "{name: logit_adjusted}"):
        with pytest.raises(UserError, match="needs the number of training samples of each class"):
            load_recipe("digits", [*stream, *rest, f"loss={loss}"])


def test_lists_that_do_not_fit_the_classes_are_refused() -> None:
    for config in (
        {"name": "hinge", "class_weights": [1, 2]},
        {"name": "expected_cost", "cost_vector": [1, 2]},
    ):
        with pytest.raises(UserError, match="has 2 values, and the data 5 classes"):
            built(config)
    for name in ("ldam", "logit_adjusted"):
        with pytest.raises(UserError, match="none of class b"):
            build_loss(ADAPTER.validate_python({"name": name}), None, ClassCounts("ab", [3, 0]))
    with pytest.raises(UserError, match="0 for every class"):
        built({"name": "hinge", "class_weights": [0, 0, 0, 0, 0]})


class Digits(nn.Module):
    """A hidden layer, and a head of its own or of cosines."""

    def __init__(self, cosines: bool) -> None:
        super().__init__()
        self.body, self.fc = nn.Linear(64, 32), nn.Linear(32, CLASSES)
        self.cosines = cosines
        if cosines:
            self.fc.scale = SCALE  # type: ignore[assignment]

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.body(x))
        if self.cosines:
            return SCALE * F.linear(F.normalize(x), F.normalize(self.fc.weight))
        out: Tensor = self.fc(x)
        return out


@pytest.mark.parametrize(
    "config",
    [*(config for config, _ in CASES.values()), {"name": "large_margin"}, {"name": "center"}],
    ids=lambda config: str(config["name"]),
)
def test_each_loss_learns(config: dict[str, Any]) -> None:
    images, labels = load_digits(n_class=CLASSES, return_X_y=True)
    x, y = torch.tensor(images / 16).float(), torch.tensor(labels)
    if config["name"] == "expected_cost":  # with others it learns other answers
        config = {"name": "expected_cost", "cost_vector": [1, 1, 1, 1, 1.5]}
    torch.manual_seed(0)
    model = Digits(cosines=config["name"] in ("arcface", "cosface"))
    counts = ClassCounts("abcde", [120] * CLASSES)  # about as many as there are
    objective = build_objective(ADAPTER.validate_python(config), model, counts)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        objective(model, x[:600], F.one_hot(y[:600], CLASSES).float()).backward()
        optimizer.step()
    accuracy = (model.eval()(x[600:]).argmax(1) == y[600:]).float().mean()
    assert accuracy > 0.9
