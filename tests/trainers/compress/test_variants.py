"""What the command line's lists mean."""

import pytest

from bigbatch.configs.errors import UserError
from bigbatch.trainers.compress.variants import METHODS, Variant, make_variants


def names(*arguments: str | None) -> list[str]:
    return [variant.name for variant in make_variants(*arguments)]


def test_each_method_with_each_of_its_settings() -> None:
    assert names("prune, lowrank,int8", "0.5,0.75") == [
        "prune-0.5", "prune-0.75", "lowrank-0.5", "lowrank-0.75", "int8",
    ]  # fmt: skip
    assert names("codebook", None, None, "2,8") == ["codebook-2bit", "codebook-8bit"]
    assert names("lowrank,structured", None, "0.9") == ["lowrank-energy0.9", "structured-0.5"]
    assert [make_variants(method) for method in METHODS] == [
        [Variant("prune", share=0.5)],
        [Variant("structured", share=0.5)],
        [Variant("lowrank", share=0.5)],
        [Variant("int8")],
        [Variant("codebook", bits=5)],
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("prun",), "--method 'prun' is none of prune, structured, lowrank, int8, codebook"),
        (("",), "--method '' is none of"),
        (("prune", "0"), "--share 0 must lie between 0 and 1"),
        (("prune", "0.5,1"), "--share 1 must lie between"),
        (("prune", "nan"), "--share nan must lie between"),
        (("prune", "half"), "--share 'half' is no number"),
        (("lowrank", None, "-0.1"), "--energy -0.1 must lie between"),
        (("codebook", None, None, "9"), "--bits 9 must be a whole number from 1 to 8"),
        (("codebook", None, None, "2.5"), "--bits 2.5 must be a whole number"),
        (("codebook", None, None, "inf"), "--bits inf must be a whole number"),
        (("int8", "0.5"), "--share 0.5 is for prune, structured, and lowrank without --energy"),
        (("lowrank", "0.5", "0.9"), "--share 0.5 is for"),
        (("prune", None, "0.9"), "--energy 0.9 is for lowrank"),
        (("prune", None, None, "4"), "--bits 4 is for codebook"),
        (("prune,int8,prune",), "prune-0.5 is asked for twice"),
        (("prune", "0.5,0.50"), "prune-0.5 is asked for twice"),
    ],
)
def test_what_means_nothing_is_refused(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_variants(*arguments)
