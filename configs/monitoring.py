"""What a run says about itself, and where; trainers/monitoring says it."""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from bigbatch.configs.part import Count, StrictModel


class Log(StrictModel):
    """What a run records, and where."""

    every: Count = Field(1, description="steps between records in metrics.jsonl")
    details_every: Count = Field(
        50, description="steps between records of timing by rank, trust ratios, and the machine"
    )
    ledger_every: Count | None = Field(
        10,
        description="steps between lines of ledger.jsonl, digests of the state, which planned "
        "checkpoints and the last step also have; null: none",
    )
    samples: bool = Field(
        False,
        description="write each sample's loss, margin and p(true) at each visit to samples.f16, 6 "
        "bytes each, for `bigbatch samples`",
    )
    wandb: Literal["auto", "online", "offline", "off"] = Field(
        "auto", description="auto: online where logged in, otherwise offline"
    )
    project: str = Field("bigbatch", description="wandb project")
    tensorboard: bool = Field(False, description="also write event files to tensorboard/")
    prometheus: str | None = Field(
        None, description="folder of node_exporter's textfile collector, for bigbatch-RUN.prom"
    )
    diagnosis: bool = Field(
        True,
        description="measure what the run's diagnosis goes by, at up to eight evaluations: a few "
        "training images under evaluation conditions, dead units, gradients by layer",
    )
    report: bool = Field(
        True, description="draw report.html at the end; `bigbatch report RUN` draws it at any time"
    )
    trace: bool = Field(False, description="write every micro-batch's samples to trace/")


def refusals(recipe: Any) -> Iterator[str]:
    """What cannot be recorded of a recipe."""
    if recipe.log.samples and recipe.data.stream is not None:
        yield (
            "log.samples does not go with data.stream, whose samples have no place in an order; "
            "index the tars and set data.path, or set log.samples=false"
        )
