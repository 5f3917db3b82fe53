"""One model out of several: averages of weights, and what lies between them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from bigbatch.configs.judged import ACCURACY, NLL, Score
from bigbatch.trainers.engine import Engine
from bigbatch.trainers.recovery.tensor_files import load_weights

SOUP = "soup.safetensors"
Scores = dict[str, float]  # of the validation split
POINTS = 11  # of a line between two models


@dataclass(frozen=True)
class SoupStep:
    """Why one ingredient is in the soup, or is not.

    `before` and `after` are scores on the validation split, of the soup without and with it (of
    the first, both are its own). `barrier` is what the loss of the average is above a straight
    line between those of the soup without and of the ingredient alone, on which it lies; below 0
    where averaging helps, None of the first.
    """

    name: str
    kept: bool
    before: float
    after: float
    barrier: float | None


def greedy_soup(
    files: Mapping[str, Path],
    losses: Sequence[float],
    model: nn.Module,
    engine: Engine,
    evaluate: Callable[[], Scores | None],
    recompute: Callable[[], None],
    judge: Score = ACCURACY,
    loss: Score = NLL,
) -> list[SoupStep]:
    """Greedy soup (Wortsman et al. 2022, recipe 1) of files of weights, by name, best first.

    A model joins the average if the validation score `judge` does not suffer. BatchNorm
    statistics are recomputed for every candidate: those of averaged weights are not the average of
    the statistics. `losses` are those of the files alone, by `loss`; `evaluate` scores the model on
    rank 0, and returns None elsewhere. Collective; leaves the soup in the model.
    """
    (first, path), *others = files.items()
    total = _doubles(load_weights(model, path))
    best = engine.from_main(evaluate())
    steps = [SoupStep(first, True, best[judge.key], best[judge.key], None)]
    count, kept_state = 1, _copy(model)
    for (name, path), own in zip(others, losses[1:], strict=True):
        candidate = _sum(total, load_weights(model, path))
        average(model, candidate, count + 1)
        recompute()
        found = engine.from_main(evaluate())
        kept = judge.merit(found) >= judge.merit(best)
        barrier = found[loss.key] - (count * best[loss.key] + own) / (count + 1)
        steps.append(SoupStep(name, kept, best[judge.key], found[judge.key], barrier))
        if kept:
            best, total = found, candidate
            count, kept_state = count + 1, _copy(model)
    model.load_state_dict(kept_state)
    return steps


def uniform_soup(paths: Sequence[Path], model: nn.Module, recompute: Callable[[], None]) -> None:
    """Load the average of all files of weights into the model (Wortsman et al. 2022, section 2).

    The soup of equal float32 models is itself, bit for bit, but for what `recompute` recomputes.
    """
    total = _doubles(load_weights(model, paths[0]))
    for path in paths[1:]:
        total = _sum(total, load_weights(model, path))
    average(model, total, len(paths))
    recompute()


def average(model: nn.Module, total: dict[str, Tensor], count: int) -> None:
    """Load ``total / count``, a sum in float64, into the model.

    Integer buffers are rounded down: BatchNorm counts batches in one, and uses it only where its
    momentum is None.
    """
    own = model.state_dict()
    model.load_state_dict({k: (v / count).to(own[k].dtype) for k, v in total.items()})


@dataclass(frozen=True)
class Barrier:
    """Losses at evenly spaced points of the line from one model to another, ends included."""

    losses: tuple[float, ...]

    @property
    def height(self) -> float:
        """The loss barrier: the most that it is above a straight line between its ends, or 0.

        Entezari et al. 2022 (arXiv:2110.06296), definition 2.1; with ends of equal loss also that
        of Frankle et al. 2020 (arXiv:1912.05671), section 2, who take the mean of both. Near 0 an
        average of the two makes sense; models of independent seeds are far from that.
        """
        last = len(self.losses) - 1
        first, end = self.losses[0], self.losses[-1]
        return max(x - first - (end - first) * i / last for i, x in enumerate(self.losses[:-1]))


def loss_barrier(
    first: dict[str, Tensor],
    second: dict[str, Tensor],
    score: Callable[[dict[str, Tensor]], float],
    points: int = POINTS,
) -> Barrier:
    """Losses on the straight line between two models' weights (Frankle et al. 2020).

    `score` gives the loss of a state dict; it recomputes BatchNorm statistics where there are any,
    since those between two models are not between theirs. The ends are given as they are; between
    them floats are interpolated in float64, and integer buffers rounded down. Raises ValueError
    where the two are not of one architecture, or for fewer than three points.
    """
    if points < 3:
        raise ValueError(f"{points} points; a line needs 3 or more: both ends, and one between")
    if odd := [k for k in {**first, **second} if _form(first.get(k)) != _form(second.get(k))]:
        raise ValueError(f"no line between two architectures: {odd[0]} differs")
    losses = [score(first)]
    for point in range(1, points - 1):
        far = point / (points - 1)
        between = {
            k: ((1 - far) * v.double() + far * second[k].double()).to(v.dtype)
            for k, v in first.items()
        }
        losses.append(score(between))
    return Barrier((*losses, score(second)))


def _form(tensor: Tensor | None) -> object:
    return None if tensor is None else (tensor.shape, tensor.dtype)


def _doubles(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.double() for k, v in weights.items()}


def _sum(total: dict[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: total[k] + v for k, v in weights.items()}


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}
