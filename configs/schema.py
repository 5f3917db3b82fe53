"""The recipe: everything that decides what a training run computes."""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from bigbatch.configs import (
    augment,
    averaging,
    backends,
    batch,
    data,
    distill,
    losses,
    model,
    monitoring,
    optimizers,
    phases,
    recovery,
    regularise,
    stream,
    targets,
    transfer,
)
from bigbatch.configs.augment import Augment
from bigbatch.configs.averaging import Average
from bigbatch.configs.backends import Backend
from bigbatch.configs.batch import GlobalBatch
from bigbatch.configs.clipping import Clip
from bigbatch.configs.data import Data
from bigbatch.configs.distill import Distill
from bigbatch.configs.durations import Period
from bigbatch.configs.ensemble import Ensemble
from bigbatch.configs.evaluation import Evaluate
from bigbatch.configs.losses import CrossEntropy, Loss
from bigbatch.configs.model import Model
from bigbatch.configs.monitoring import Log
from bigbatch.configs.optimizers import Optimizer
from bigbatch.configs.part import Count, StrictModel
from bigbatch.configs.phases import Swap
from bigbatch.configs.recovery import Checkpoint, Recovery
from bigbatch.configs.regularise import Regularise
from bigbatch.configs.schedules import Cosine, Schedule
from bigbatch.configs.size import Size
from bigbatch.configs.timeline import Timeline
from bigbatch.configs.transfer import Transfer

# What keys of several parts may not ask for together; each rule stands beside its part.
_RULES = tuple(
    part.refusals
    for part in (
        batch,
        backends,
        optimizers,
        averaging,
        recovery,
        data,
        stream,
        model,
        augment,
        losses,
        targets,
        regularise,
        distill,
        transfer,
        monitoring,
        phases,
    )
)


class Recipe(StrictModel):
    """One training run. A step is a pure function of this recipe and the step number."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] = Field(
        "run", description="of runs that are given none; a file's own name where it says none"
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0, description="of weights, order, augmentation and dropout"
    )
    duration: Period = Field(description="of training: epochs, steps or samples")
    global_batch: GlobalBatch = Field(
        256,
        description="samples in one optimizer step: a number, or how it changes over the run: "
        "stages, doubling, linear or noise_scale",
    )
    micro_batch: Count = Field(64, description="samples in one forward/backward pass")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="of forward and backward passes; weights stay fp32"
    )
    backend: Backend = Field(
        "ddp",
        description="what each rank holds: ddp everything; zero1 its share of the optimizer "
        "state, zero2 also of the gradients, fsdp2 also of the parameters",
    )
    reduction: Literal["overlapped", "exact"] = Field(
        "overlapped",
        description="overlapped: gradients cross ranks during the backward pass; exact: summed "
        "in float64 after it, so that weights do not depend on the world size, bit for bit",
    )
    determinism: Literal["none", "full"] = Field(
        "none",
        description="full: only algorithms that give the same bits each time on the same machine, "
        "and one order of DDP's sums from the first step on; slower on a GPU",
    )
    clip: Clip | None = Field(None, description="gradient clipping: norm, value or adaptive")
    data: Data = Field(description="where samples come from, and in what order")
    model: Model = Field(description="the network and what it starts from")
    transfer: Transfer | None = Field(
        None,
        description="what learns of weights to start from: head, all, frozen or gradual",
    )
    loss: Loss = Field(CrossEntropy(), description="what is minimised")
    distill: Distill | None = Field(None, description="learn from a teacher too: soft or logits")
    optimizer: Optimizer = Field(description="how gradients change weights, and at which rate")
    schedule: Schedule = Field(
        Cosine(name="cosine"), description="multiplies optimizer.lr over the run"
    )
    regularise: Regularise = Field(
        Regularise(), description="what keeps the model from learning by heart"
    )
    average: Average | None = Field(
        None,
        description="also keep an average of the weights, a model of its own at the run's end: "
        "ema or swa",
    )
    phases: Swap | None = Field(
        None,
        description="what follows this training, which is then a trunk: swap, workers whose "
        "weights are averaged",
    )
    augment: Augment = Field(Augment(), description="what happens to images before the network")
    evaluate: Evaluate = Field(Evaluate(), description="when and how the run is scored")
    checkpoint: Checkpoint = Field(
        Checkpoint(), description="when the run is saved, and what is kept"
    )
    recovery: Recovery = Field(
        Recovery(), description="what happens when a step or a rank goes wrong"
    )
    ensemble: Ensemble = Field(Ensemble(), description="which snapshots are combined at the end")
    log: Log = Field(Log(), description="where records go beside the run directory")

    @property
    def micro_batches(self) -> int:
        """Micro-batches in one step, the largest where they differ."""
        return self.largest_batch // self.micro_batch

    @property
    def first_batch(self) -> int:
        """Samples in the run's first step."""
        return batch.sizes(self.global_batch)[0]

    @property
    def largest_batch(self) -> int:
        return max(batch.sizes(self.global_batch))

    @property
    def smallest_batch(self) -> int:
        return min(batch.sizes(self.global_batch))

    @property
    def common_batch(self) -> int:
        """The largest number of samples of which the batch of every step is a multiple."""
        return math.gcd(*batch.sizes(self.global_batch))

    def lr_gain(self, samples: int, noise: float, signal: float) -> float:
        """What measured gradients multiply the learning rate by in a step of so many samples."""
        changing = self.global_batch
        return 1.0 if isinstance(changing, int) else changing.gain(samples, noise, signal)

    def batch_norm_power(self, samples: int) -> float:
        """For how many steps of the first batch one of so many moves running statistics."""
        changing = self.global_batch
        return 1.0 if isinstance(changing, int) else changing.batch_norm_power(samples)

    def timeline(self, epoch_samples: int) -> Timeline:
        """Which samples each step takes. Raises UserError where a piece of it holds no step."""
        return batch.timeline(self.global_batch, epoch_samples)

    @property
    def eval_size(self) -> Size:
        """The size of what the model sees after training, and in between: evaluation, export."""
        return self.evaluate.image_size or self.data.image_size

    @property
    def views(self) -> int:
        """Images of each sample that pass through the model in a step."""
        return 3 if self.loss.name == "jsd" else 1

    @property
    def lr_scale(self) -> float:
        """What optimizer.scale multiplies the learning rate by at the run's first batch."""
        scale = self.optimizer.scale
        return 1.0 if scale is None else scale.factor(self.first_batch)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if refused := [why for rules in _RULES for why in rules(self)]:
            raise ValueError("; ".join(refused))
        return self
