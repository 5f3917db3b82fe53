"""Which methods fit which networks."""

from pathlib import Path

import pytest

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import load_recipe
from bigbatch.trainers.compress.candidates import check_variant
from bigbatch.trainers.compress.variants import Variant
from bigbatch.trainers.ensemble.members import Member


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.weight_standardization=true", r"\(model.weight_standardization\), which prune"),
        ("model.head={name: cosine}", r"\(model.head = cosine\), which prune would take"),
    ],
)
def test_weights_that_are_not_what_computes_are_not_cut(override: str, said: str) -> None:
    """A factor pair in a standardised convolution's place would compute something else."""
    recipe = load_recipe("digits", [override])
    member = Member("digits/soup", Path("none.safetensors"), recipe, ("a", "b"))
    with pytest.raises(UserError, match=said):
        check_variant(member, Variant("prune", share=0.5))
    check_variant(member, Variant("codebook", bits=4))
