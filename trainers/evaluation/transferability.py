"""How to train on from given weights: by the size of the data, and by how near it is to theirs.

Nearness is measured, not guessed: by the accuracy of the nearest neighbour among features, which
ranks models for transfer as well as costlier proxies do (Renggli et al. 2022, arXiv:2010.06402).
The rule is that of the course CS231n (Stanford, "Transfer Learning"), which rests on Yosinski et
al. 2014 (arXiv:1411.1792): lower layers are general, upper ones belong to their task.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bigbatch.trainers.evaluation.accuracy import wilson

SIMILAR = 0.5  # of the way from chance to certainty, from which on the data counts as similar
ULMFIT = 0.385  # 1 / 2.6 (arXiv:1801.06146, section 3.2)
_BLOCK = 512  # samples whose neighbours are sought at once


@dataclass(frozen=True)
class Measured:
    """What neighbours among features say; accuracies are leave-one-out."""

    samples: int
    features: int
    accuracy: float
    interval: tuple[float, float]  # of 95 % (Wilson)
    chance: float  # that another sample drawn at random has the same class
    similarity: float  # 0 at chance, 1 at certainty


def measure(features: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> Measured:
    """The accuracy of each sample's nearest other one, by the cosine of centred features.

    Features [N, D], labels [N] from 0. Of equally near ones the first counts.
    """
    count = len(labels)
    centred = features.astype(np.float64) - features.mean(0, dtype=np.float64)
    lengths = np.linalg.norm(centred, axis=1, keepdims=True)
    unit = (centred / np.where(lengths > 0, lengths, 1)).astype(np.float32)
    right = 0
    for first in range(0, count, _BLOCK):
        cosines = unit[first : first + _BLOCK] @ unit.T
        rows = np.arange(len(cosines))
        cosines[rows, first + rows] = -np.inf
        nearest = cosines.argmax(1)
        right += int((labels[nearest] == labels[first : first + _BLOCK]).sum())
    sizes = np.bincount(labels)
    pairs = count * (count - 1)
    chance = float((sizes * (sizes - 1)).sum() / pairs) if pairs else 1.0
    accuracy = right / count if count else 0.0
    similarity = (accuracy - chance) / (1 - chance) if chance < 1 else 0.0
    return Measured(
        count,
        features.shape[1],
        accuracy,
        wilson(right, count),
        chance,
        max(0.0, similarity),
    )


def advise(
    measured: Measured, counts: Sequence[int], small: int, stages: Sequence[str]
) -> dict[str, Any]:
    """The case of the rule, why, and the recipe's keys.

    `counts` are the training samples of each class, `small` the median of them below which the
    data counts as small; `stages` are those whose features could be joined, the last one left out.
    """
    each = float(np.median([count for count in counts if count] or [0]))
    few, near = each < small, measured.similarity >= SIMILAR
    low, high = (
        (bound - measured.chance) / (1 - measured.chance) if measured.chance < 1 else 0.0
        for bound in measured.interval
    )
    joined = list(stages)[len(stages) // 2 :]
    match few, near:
        case True, True:
            why = "the features fit, and few samples would only bend them: train the head alone"
            keys = ["transfer={name: head}"]
        case True, False:
            why = (
                "the upper layers belong to another task, and there is too little to train them "
                "by: train a head on features from further below too"
            )
            keys = ["transfer={name: head}"]
            if joined:
                keys.append(f"model.joined_stages=[{', '.join(joined)}]")
        case False, True:
            why = (
                "the features fit, and there is enough to improve them: fine-tune from the top "
                "down, lower stages more slowly"
            )
            keys = [f"transfer={{name: gradual, every: 1 epochs, stage_decay: {ULMFIT}}}"]
        case _:
            why = (
                "there is enough to train everything, and the upper layers have to change: "
                "fine-tune all at one rate; the weights still are a better start than none"
            )
            keys = ["transfer=null"]
    return {
        "measured": asdict(measured),
        "classes": sum(count > 0 for count in counts),
        "samples_of_a_class": each,
        "small_below": small,
        "size": "small" if few else "large",
        "similarity": "similar" if near else "different",
        "clear": not low < SIMILAR < high,
        "why": why,
        "keys": keys,
    }


def in_words(advice: dict[str, Any], recipe: str) -> list[str]:
    """What `bigbatch advise --transfer` prints; `recipe` as a command line names it."""
    found = advice["measured"]
    low, high = found["interval"]
    unclear = "" if advice["clear"] else "; the interval leaves it open, so try both neighbours"
    return [
        f"size        {advice['size']}: {advice['samples_of_a_class']:,.0f} training samples of a "
        f"class (median); small is below {advice['small_below']:,}",
        f"similarity  {advice['similarity']}: nearest neighbours agree in {found['accuracy']:.1%} "
        f"({low:.1%} to {high:.1%}) of {found['samples']:,} samples, by chance in "
        f"{found['chance']:.1%}; that is {found['similarity']:.2f} of the way to certainty, "
        f"similar from {SIMILAR:g} on{unclear}",
        f"advice      {advice['why']}",
        f"keys        bigbatch train {recipe} " + " ".join(f"'{key}'" for key in advice["keys"]),
    ]
