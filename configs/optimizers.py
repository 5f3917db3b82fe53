"""Optimizers as a recipe writes them; trainers/optim builds them. docs/optimizers.md explains."""

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from bigbatch.configs.part import Count, Fraction, NonNegative, Positive, StrictModel
from bigbatch.configs.schedules import Schedule, depends_on_evaluations

Beta = Annotated[float, Field(ge=0, lt=1)]  # at 1 an average never takes anything in
Betas = tuple[Beta, Beta]


class Scale(StrictModel):
    """The batch that `lr` is right for, and the rule that carries it over to global_batch."""

    rule: Literal["linear", "sqrt"] = Field(
        description="linear: lr grows with the batch (Goyal et al. 2017); sqrt: with its square "
        "root (Krizhevsky 2014), usual for Adam and LAMB"
    )
    base_batch: Count = Field(256, description="samples in a step that lr is right for")

    def factor(self, batch: int) -> float:
        """The learning rate at `batch` samples a step, relative to that at `base_batch`."""
        ratio = batch / self.base_batch
        return ratio if self.rule == "linear" else math.sqrt(ratio)


class OptimizerBase(StrictModel):
    """Fields of every optimizer."""

    lr: Positive = Field(description="learning rate; schedule multiplies it")
    scale: Scale | None = Field(None, description="lr is for a base batch; scale it to this one")
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="the rate falls by this factor from each layer to the one below (BEiT)"
    )


class Decaying(OptimizerBase):
    """Norm layers and biases never decay."""

    weight_decay: NonNegative = Field(
        0.0, description="of weights alone: norm layers and biases never decay"
    )
    weight_decay_of: dict[Annotated[str, Field(min_length=1)], NonNegative] = Field(
        default_factory=dict,
        description="another decay by layer: its path, with * for any one name in it, for all "
        "below it, or type:Conv2d; where several fit, the last one counts",
    )


class _Momentum(Decaying):
    momentum: Fraction = Field(0.9, description="share of the running step that is kept")
    nesterov: bool = Field(False, description="look ahead by the momentum")
    momentum_schedule: Schedule | None = Field(
        None,
        description="multiplies momentum, as schedule does lr; never 0, nor above 1 / momentum",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.momentum_schedule is not None and self.momentum == 0:
            raise ValueError(
                "momentum_schedule multiplies a momentum of 0; set momentum or drop it"
            )
        if self.momentum_schedule is not None and depends_on_evaluations(self.momentum_schedule):
            raise ValueError(
                "momentum_schedule cannot hold a plateau, which is for rates; choose another "
                "schedule"
            )
        if self.nesterov and self.momentum == 0:
            raise ValueError(
                "nesterov: true with momentum 0 changes nothing; set momentum or drop it"
            )
        return self


class SGD(_Momentum):
    """Stochastic gradient descent; decay is added to the gradient."""

    name: Literal["sgd"]


class LARS(_Momentum):
    """You et al. 2017, algorithm 1."""

    name: Literal["lars"]
    trust_coefficient: Positive = Field(
        0.001, description="eta: a layer's step over its weights' norm"
    )
    eps: NonNegative = Field(0.0, description="added to the trust ratio's denominator")
    momentum_form: Literal["lr_inside", "lr_outside"] = Field(
        "lr_inside",
        description="lr_inside: v = m v + lr trust g (You et al.; MLPerf); "
        "lr_outside: v = m v + trust g, w -= lr v (torch's SGD form)",
    )
    trust_clip: bool = Field(False, description="LARC clipping: effective rate at most lr")


class LAMB(Decaying):
    """You et al. 2020, algorithm 2."""

    name: Literal["lamb"]
    betas: Betas = Field((0.9, 0.999), description="decay of the first and second moments")
    eps: Positive = Field(1e-6, description="added to the denominator")
    bias_correction: bool = Field(True, description="undo that moments start at 0")
    trust_bounds: tuple[NonNegative, NonNegative] | None = Field(
        None, description="lower and upper bound of the trust ratio"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.trust_bounds is not None and self.trust_bounds[0] > self.trust_bounds[1]:
            raise ValueError(f"trust_bounds {list(self.trust_bounds)}: put the lower bound first")
        return self


class Adam(Decaying):
    """Kingma and Ba 2015; decay is added to the gradient (AdamW decays apart from it)."""

    name: Literal["adam"]
    betas: Betas = Field((0.9, 0.999), description="decay of the first and second moments")
    eps: Positive = Field(1e-8, description="added to the denominator")


class AdamW(Decaying):
    """Loshchilov and Hutter 2019."""

    name: Literal["adamw"]
    betas: Betas = Field((0.9, 0.999), description="decay of the first and second moments")
    eps: Positive = Field(1e-8, description="added to the denominator")


class Adagrad(Decaying):
    """Duchi et al. 2011."""

    name: Literal["adagrad"]
    initial_accumulator_value: NonNegative = Field(
        0.0, description="the sum of squares starts at this"
    )
    eps: Positive = Field(1e-10, description="added to the denominator")


class Adadelta(Decaying):
    """Zeiler 2012."""

    name: Literal["adadelta"]
    rho: Fraction = Field(0.9, description="decay of the two averages of squares")
    eps: Positive = Field(1e-6, description="added under the roots")


class RMSprop(Decaying):
    """Tieleman and Hinton 2012."""

    name: Literal["rmsprop"]
    alpha: Fraction = Field(0.99, description="decay of the average of squares")
    eps: Positive = Field(1e-8, description="added to the denominator")
    momentum: Fraction = Field(0.0, description="share of the running step that is kept")
    centered: bool = Field(
        False, description="divide by the standard deviation, not the root of the mean square"
    )


class NovoGrad(Decaying):
    """Ginsburg et al. 2019: one second moment for each layer."""

    name: Literal["novograd"]
    betas: Betas = Field((0.95, 0.98), description="decay of the first and second moments")
    eps: Positive = Field(1e-8, description="added to the denominator")
    grad_averaging: bool = Field(
        False, description="take 1 - beta1 of each new gradient, not all of it"
    )


class Adafactor(Decaying):
    """Shazeer and Stern 2018: second moments by rows and columns; rates relative to weights."""

    name: Literal["adafactor"]
    beta2_decay: Annotated[float, Field(lt=0)] = Field(
        -0.8, description="second moments decay by 1 - step ^ this"
    )
    clip_threshold: Positive = Field(1.0, description="largest root mean square of an update")


class SM3(OptimizerBase):
    """Anil et al. 2019: Adagrad in the memory of rows and columns; has no weight decay."""

    name: Literal["sm3"]
    momentum: Beta = Field(0.9, description="share of the running step that is kept")
    beta: Fraction = Field(0.0, description="decay of the accumulators; 0 adds up all squares")


class Lion(Decaying):
    """Chen et al. 2023: the sign of an interpolated momentum; decay apart from it."""

    name: Literal["lion"]
    betas: Betas = Field(
        (0.9, 0.99), description="of the step's interpolation, and of the momentum's decay"
    )


Rest = Annotated[LAMB | AdamW | SGD, Field(discriminator="name")]
_ADAMW_KEYS = ("adamw_lr", "adamw_betas", "adamw_eps")


class Muon(_Momentum):
    """Jordan et al. 2024: orthogonal steps for hidden matrices, another optimizer for the rest.

    Hidden are the weights of linear layers and convolutions, but for the classifier's and patch
    embeddings.
    """

    name: Literal["muon"]
    momentum: Beta = Field(0.95, description="share of the running step that is kept")
    nesterov: bool = Field(True, description="look ahead by the momentum")
    adjust_lr: Literal["original", "match_rms"] = Field(
        "original",
        description="of a matrix of out x in: original: lr sqrt(max(1, out / in)) (Jordan et al.); "
        "match_rms: lr 0.2 sqrt(max(out, in)), steps of AdamW's size, so its rates carry over "
        "(Liu et al. 2025)",
    )
    ns_steps: Annotated[int, Field(ge=1, le=20)] = Field(
        5, description="Newton-Schulz iterations that make a step orthogonal"
    )
    ns_precision: Literal["fp32", "bf16"] = Field("fp32", description="what they are computed in")
    rest: Rest = Field(
        AdamW(name="adamw", lr=3e-4, betas=(0.9, 0.95), eps=1e-10),
        description="the optimizer of everything else, with its own lr and weight_decay; "
        "schedule, scale and layer_decay hold for both",
    )

    @model_validator(mode="before")
    @classmethod
    def _old_keys(cls, tree: Any) -> Any:
        """Recipes of 0.1 have AdamW's settings beside Muon's."""
        if not isinstance(tree, dict) or tree.keys().isdisjoint({*_ADAMW_KEYS, "match_adamw"}):
            return tree
        new = {k: v for k, v in tree.items() if k not in (*_ADAMW_KEYS, "match_adamw")}
        for old, key in (*((k, "rest") for k in _ADAMW_KEYS), ("match_adamw", "adjust_lr")):
            if old in tree and key in new:
                raise ValueError(f"{old} is an old key that {key} takes the place of; remove {old}")
        if tree.get("match_adamw"):
            new["adjust_lr"] = "match_rms"
        adamw = {k.removeprefix("adamw_"): tree[k] for k in _ADAMW_KEYS if k in tree}
        if adamw:
            decay = tree.get("weight_decay", 0.0)
            first = {"name": "adamw", "lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-10}
            new["rest"] = first | {"weight_decay": decay} | adamw
        return new

    @model_validator(mode="after")
    def _check_rest(self) -> Self:
        shared: dict[str, Any] = {
            "scale": None,
            "layer_decay": 1.0,
            "weight_decay_of": {},
            "momentum_schedule": None,
        }
        for key, unsaid in shared.items():
            if getattr(self.rest, key, unsaid) != unsaid:
                raise ValueError(f"rest.{key}: say it once, of muon itself; remove it from rest")
        return self


class LBFGS(OptimizerBase):
    """Nocedal and Wright 2006, algorithm 7.5, for large batches: a step evaluates the same
    global batch several times. It keeps `history` pairs of vectors as long as all weights."""

    name: Literal["lbfgs"]
    max_iter: Count = Field(4, description="updates in one step of ours")
    history: Count = Field(10, description="pairs of vectors that are kept")
    line_search: Literal["strong_wolfe", "none"] = Field(
        "strong_wolfe", description="none takes lr as the length of each update"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.layer_decay != 1.0:
            raise ValueError("layer_decay: L-BFGS has one rate for all layers; set it to 1")
        return self


Optimizer = Annotated[
    SGD
    | LARS
    | LAMB
    | Adam
    | AdamW
    | Adagrad
    | Adadelta
    | RMSprop
    | NovoGrad
    | Adafactor
    | SM3
    | Lion
    | Muon
    | LBFGS,
    Field(discriminator="name"),
]

# Exact on pieces of layers: those that treat each element alone, and our three: LARS and LAMB add
# up their norms across pieces, Muon puts layers together.
SHARDABLE = (
    *("sgd", "lars", "lamb", "adam", "adamw", "adagrad", "adadelta", "rmsprop", "lion", "muon"),
)


def refusals(recipe: Any) -> Iterator[str]:
    """What a recipe's optimizer cannot work with."""
    if recipe.optimizer.name == "lbfgs" and (recipe.clip is not None or recipe.precision == "fp16"):
        yield (
            "optimizer lbfgs compares losses and gradients of one function: it works without "
            "clip, and with precision fp32 or bf16"
        )
