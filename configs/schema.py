"""The recipe: everything that decides what a training run computes."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from bigbatch.configs import (
    augment,
    averaging,
    backends,
    data,
    distill,
    losses,
    model,
    optimizers,
    recovery,
    regularise,
    stream,
    transfer,
)
from bigbatch.configs.augment import Augment
from bigbatch.configs.averaging import Average
from bigbatch.configs.backends import Backend
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
from bigbatch.configs.recovery import Checkpoint, Recovery
from bigbatch.configs.regularise import Regularise
from bigbatch.configs.schedules import Cosine, Schedule
from bigbatch.configs.size import Size
from bigbatch.configs.transfer import Transfer

# What keys of several parts may not ask for together; each rule stands beside its part.
_RULES = tuple(
    part.refusals
    for part in (
        backends,
        optimizers,
        averaging,
        recovery,
        data,
        stream,
        model,
        augment,
        losses,
        regularise,
        distill,
        transfer,
    )
)


class Recipe(StrictModel):
    """One training run. A step is a pure function of this recipe and the step number."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] = "run"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    duration: Period
    global_batch: Count = Field(256, description="samples in one optimizer step")
    micro_batch: Count = Field(64, description="samples in one forward/backward pass")
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
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
    clip: Clip | None = Field(None, description="gradient clipping: norm, value or adaptive")
    data: Data
    model: Model
    transfer: Transfer | None = Field(
        None,
        description="what learns of weights to start from: head, all, frozen or gradual",
    )
    loss: Loss = CrossEntropy()
    distill: Distill | None = Field(None, description="learn from a teacher too: soft or logits")
    optimizer: Optimizer
    schedule: Schedule = Cosine(name="cosine")
    regularise: Regularise = Regularise()
    average: Average | None = Field(
        None,
        description="also keep an average of the weights, a model of its own at the run's end: "
        "ema or swa",
    )
    augment: Augment = Augment()
    evaluate: Evaluate = Evaluate()
    checkpoint: Checkpoint = Checkpoint()
    recovery: Recovery = Recovery()
    ensemble: Ensemble = Ensemble()
    log: Log = Log()

    @property
    def micro_batches(self) -> int:
        """Micro-batches in one step: also the largest world size that can run the recipe."""
        return self.global_batch // self.micro_batch

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
        """What optimizer.scale multiplies the learning rate by at this global_batch."""
        scale = self.optimizer.scale
        return 1.0 if scale is None else scale.factor(self.global_batch)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.global_batch % self.micro_batch:
            raise ValueError(
                f"global_batch {self.global_batch} is not a multiple of micro_batch "
                f"{self.micro_batch}; choose a micro_batch that divides it"
            )
        if refused := [why for rules in _RULES for why in rules(self)]:
            raise ValueError("; ".join(refused))
        return self
