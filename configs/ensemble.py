"""What is made of a run's snapshots; trainers/ensemble makes it."""

from pydantic import Field

from bigbatch.configs.part import Fraction, StrictModel


class Ensemble(StrictModel):
    """Snapshots at the ends of cosine cycles, and what is made of them."""

    selection_margin: Fraction = Field(
        0.02,
        description="a snapshot is a member if its val accuracy is this near the best one; of an "
        "error, such as MAE, this share of the best one",
    )
    soup: bool = Field(True, description="also build a greedy weight soup")
