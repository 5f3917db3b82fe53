"""evaluation.json: the statistics of a split, written by one function and read strictly."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bigbatch.configs.files import to_json, write_atomically
from bigbatch.trainers.evaluation.by_sample import OUTCOMES

EVALUATION = "evaluation.json"
WORST = "worst.png"  # the mistakes that were made with most confidence
SCORES = "scores.json"  # in place of evaluation.json, of models that learn numbers or shares
_ROUNDED = 1e-4  # by what sums of float32 probabilities may be above 1, and scores of such below 0

Share = Annotated[float, Field(ge=0, le=1 + _ROUNDED)]
Difference = Annotated[float, Field(ge=-1, le=1)]
Interval = tuple[Share, Share]
Count = Annotated[int, Field(ge=0, le=2**53)]
NonNegative = Annotated[float, Field(ge=0)]
Loss = Annotated[float, Field(ge=-_ROUNDED)]


class _Part(BaseModel):
    """What is not read may be there; what is read has its type, and no number is NaN."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)


class Reliability(_Part):
    count: list[Count]
    confidence: list[Share | None]  # None: an empty bin
    accuracy: list[Share | None]

    @model_validator(mode="after")
    def _whole(self) -> Self:
        for count, *figures in zip(self.count, self.confidence, self.accuracy, strict=True):
            if count and None in figures:
                raise ValueError("a bin with samples has no figures")
        return self


class Scores(_Part):
    nll: Loss
    brier: Loss
    ece: Share


class Before(Scores):
    reliability: Reliability


class Scored(Scores):
    accuracy: Share
    accuracy_interval: Interval


class Named(Scored):
    name: str


class Point(_Part):
    coverage: Share
    accuracy: Share


class RiskCoverage(_Part):
    aurc: NonNegative
    accuracy_at: list[Point]
    coverage: Annotated[list[Share], Field(min_length=1)]
    risk: list[Share]

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if len(self.coverage) != len(self.risk):
            raise ValueError("risk and coverage differ in length")
        return self


class Rejection(_Part):
    below: float
    coverage: Share
    accuracy: Share | None


class Conformal(_Part):
    method: str
    level: Share
    coverage: Share
    coverage_interval: Interval
    mean_size: NonNegative
    largest: Count


class Number(_Part):
    members: Count
    accuracy: Share
    accuracy_range: Interval


class Accuracies(_Part):
    difference: Difference
    interval: tuple[Difference, Difference]


class Losses(_Part):
    difference: float


class McNemar(_Part):
    p_value: Share


class Comparison(_Part):
    best: str
    chosen_on: Literal["these samples", "other samples"]
    accuracy: Accuracies
    nll: Losses
    mcnemar: McNemar


class Members(_Part):
    each: Annotated[list[Named], Field(min_length=1)]
    disagreement: list[list[Share]]
    by_number: Annotated[list[Number], Field(min_length=1)]
    against_best: Comparison

    @model_validator(mode="after")
    def _whole(self) -> Self:
        sizes = {len(self.disagreement), *map(len, self.disagreement), len(self.by_number)}
        if sizes != {len(self.each)}:
            raise ValueError("not as many rows as members")
        return self


class Cost(_Part):
    flops_per_image: Count | None
    parameters: Count
    images_per_s: NonNegative
    peak_memory: Count | None


class Evaluation(Scored):
    """As much of evaluation.json as is shown; docs/statistics.md describes all of it."""

    samples: Annotated[int, Field(ge=1, le=2**53)]
    source: str
    notes: list[str]
    data_hash: str = ""  # of the index; of images without one: empty
    outcomes_sha256: str | None = None  # of outcomes.parquet; None: of a version that wrote none
    combination: str = "mean"
    tta: str = "none"
    mc_dropout: Count = 0
    member_names: Annotated[list[str], Field(min_length=1)]
    temperature: Annotated[float, Field(gt=0)] | None
    before_temperature: Before | None
    top5: Share | None
    top5_interval: Interval | None
    balanced_accuracy: Share
    reliability: Reliability
    risk_coverage: RiskCoverage
    rejection: Rejection | None
    conformal: list[Conformal] | None
    members: Members | None
    mistakes_drawn: Count = 0
    cost: Cost | None = None


def write_evaluation(folder: Path, content: dict[str, Any]) -> None:
    """Write evaluation.json into `folder`; a picture and outcomes that are not its own go."""
    folder.mkdir(parents=True, exist_ok=True)
    for path, own in ((WORST, "mistakes_drawn"), (OUTCOMES, "outcomes_sha256")):
        if not content.get(own):
            (folder / path).unlink(missing_ok=True)
    write_atomically(folder / EVALUATION, to_json(content, indent=1) + "\n")


def read_evaluation(folder: Path) -> dict[str, Any]:
    """What `Evaluation` names of a folder's evaluation.json.

    Raises OSError, and ValueError, in a line, where it is damaged or somebody else's.
    """
    content = (folder / EVALUATION).read_bytes()
    try:
        return Evaluation.model_validate_json(content).model_dump()
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where}: {first['msg']}" if where else first["msg"]) from None
