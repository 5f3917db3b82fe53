"""Optimizers as a recipe writes them; trainers/optim builds them."""

from typing import Annotated, Literal

from pydantic import Field

from bigbatch.configs.part import Fraction, NonNegative, Part, Positive


class OptimizerBase(Part):
    """Fields shared by all optimizers. Norm layers and biases never decay."""

    lr: Positive
    weight_decay: NonNegative = 0.0


class SGD(OptimizerBase):
    name: Literal["sgd"]
    momentum: Fraction = 0.9
    nesterov: bool = False


class AdamW(OptimizerBase):
    name: Literal["adamw"]
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Positive = 1e-8


class LARS(OptimizerBase):
    """You et al. 2017, algorithm 1."""

    name: Literal["lars"]
    momentum: Fraction = 0.9
    nesterov: bool = False
    trust_coefficient: Positive = 0.001
    eps: NonNegative = 0.0
    momentum_form: Literal["lr_inside", "lr_outside"] = Field(
        "lr_inside",
        description="lr_inside: v = m v + lr trust g (You et al.; MLPerf); "
        "lr_outside: v = m v + trust g, w -= lr v (torch's SGD form)",
    )
    trust_clip: bool = Field(False, description="LARC clipping: effective rate at most lr")


class LAMB(OptimizerBase):
    """You et al. 2020, algorithm 2."""

    name: Literal["lamb"]
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Positive = 1e-6
    bias_correction: bool = True
    trust_bounds: tuple[NonNegative, NonNegative] | None = Field(
        None, description="lower and upper bound of the trust ratio"
    )


Optimizer = Annotated[SGD | AdamW | LARS | LAMB, Field(discriminator="name")]
