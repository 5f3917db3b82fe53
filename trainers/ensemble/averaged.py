"""The average of the weights that training passed through, as a model of its own."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from bigbatch.configs.rundir import RunDir
from bigbatch.data.index import Index
from bigbatch.trainers.engine import Engine
from bigbatch.trainers.evaluation.evaluate import Evaluator
from bigbatch.trainers.models.weights_file import WeightsInfo
from bigbatch.trainers.recovery.tensor_files import save_weights


def score_average(
    run: RunDir,
    name: str,
    weights: Mapping[str, Tensor],
    engine: Engine,
    evaluator: Evaluator,
    splits: Mapping[str, Index],
    *,
    recompute: Callable[[], None],
    info: WeightsInfo | None,
) -> dict[str, dict[str, float]]:
    """Put averaged weights into the model, keep it as ensemble/NAME.safetensors, and score it.

    `weights` are the trained parameters by name. What is not trained stays as it is, but for
    running statistics, which `recompute` sets anew: those of averaged weights are not the
    average of the statistics. Collective; scores by split are rank 0's, {} elsewhere. Raises
    OSError on all ranks where the disk does not take the file.
    """
    model = engine.module
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for key, value in weights.items():
            parameters[key].copy_(value)
    recompute()

    def keep() -> None:
        run.ensemble.mkdir(exist_ok=True)
        save_weights(model, run.ensemble / f"{name}.safetensors", info)

    engine.on_main(keep)
    scores = {}
    for role, index in splits.items():
        found = evaluator.outcomes(model, index)
        if found is not None:
            scores[role] = found.scores()
    return scores
