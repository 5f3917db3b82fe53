"""One model out of several: a greedy average of weights."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from bigbatch.trainers.engine import Engine
from bigbatch.trainers.recovery.stored import MODEL
from bigbatch.trainers.recovery.tensor_files import load_weights

SOUP = "soup.safetensors"


def greedy_soup(
    paths: list[Path],
    engine: Engine,
    evaluate: Callable[[], dict[str, float] | None],
    recompute: Callable[[], None],
) -> list[str]:
    """Greedy soup (Wortsman et al. 2022, recipe 1); `paths` come best first.

    A snapshot joins the average if validation accuracy does not fall. BatchNorm statistics
    are recomputed for every candidate: those of averaged weights are not the average of
    the statistics. Leaves the soup in the model; returns the names of its ingredients.
    """
    model = engine.module
    total = {k: v.double() for k, v in load_weights(model, paths[0] / MODEL).items()}
    best = engine.from_main(_accuracy(evaluate()))
    names, kept_state = [paths[0].name], _copy(model)
    for path in paths[1:]:
        candidate = {k: total[k] + v for k, v in load_weights(model, path / MODEL).items()}
        average(model, candidate, len(names) + 1)
        recompute()
        accuracy = engine.from_main(_accuracy(evaluate()))
        if accuracy >= best:
            best, total = accuracy, candidate
            names, kept_state = [*names, path.name], _copy(model)
    model.load_state_dict(kept_state)
    return names


def average(model: nn.Module, total: dict[str, Tensor], count: int) -> None:
    """Load ``total / count`` into the model; integer buffers are rounded down."""
    own = model.state_dict()
    model.load_state_dict({k: (v / count).to(own[k].dtype) for k, v in total.items()})


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def _accuracy(scores: dict[str, float] | None) -> float | None:
    return None if scores is None else scores["accuracy"]
