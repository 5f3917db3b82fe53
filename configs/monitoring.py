"""What a run says about itself, and where; trainers/monitoring says it."""

from typing import Literal

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
    trace: bool = Field(False, description="write every micro-batch's samples to trace/")
