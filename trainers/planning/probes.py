"""At which steps a run looks at itself for its diagnosis, and at how many images. Free of torch.

An image of a probe is decoded and goes forward: on a GPU a third of what training on an image costs
(trainers/monitoring/flops.py), on a CPU with small images, where decoding counts, up to as much.
All probes together therefore have fewer than one in a hundred of the run's images.
"""

from collections.abc import Sequence
from dataclasses import dataclass

_SHARE = 0.0075  # images of all probes, of those that are trained on
_MOST, _FEWEST = 512, 64  # images of one probe: a share of 0.9 to +-2.6 and +-7 points (2 sigma)
_USUAL = 128  # images of one, as long as there are few probes
_PROBES = 8  # at most


@dataclass(frozen=True)
class Probes:
    """`steps` are those with an evaluation at which `images` of the training split are seen."""

    steps: frozenset[int] = frozenset()
    images: int = 0
    first_gradients: bool = False

    def gradients(self, step: int) -> bool:
        """Whether gradients are measured by layer in the step that `step` finishes."""
        return step in self.steps or (self.first_gradients and step == 1)


def plan_probes(evaluations: Sequence[int], total: int, samples: int) -> Probes:
    """Of a run of `total` steps and `samples` samples, evaluated after some of them.

    The first evaluation, the last, which is the run's end, and some between them, evenly.
    """
    budget = int(_SHARE * samples)
    number = max(1, min(_PROBES, budget // _USUAL))
    images = max(_FEWEST, min(_MOST, budget // number))
    last = len(evaluations) - 1
    places = [last]
    if number > 1:
        places += [i * last // (number - 1) for i in range(number - 1)]
    return Probes(frozenset(min(evaluations[p], total) for p in places), images, True)
