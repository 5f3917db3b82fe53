"""What is to be tried: methods and how far each goes. Free of torch; the command line reads it."""

from collections.abc import Sequence
from dataclasses import dataclass

from bigbatch.configs.errors import UserError

METHODS = ("prune", "structured", "lowrank", "int8", "codebook")
_BY_SHARE = ("prune", "structured", "lowrank")
FINE_TUNED = _BY_SHARE  # what has float32 weights that can be trained further
SCORED = ("prune", "structured")  # what has to know how much a weight matters
DEFAULT_SHARE, DEFAULT_BITS = "0.5", "5"


@dataclass(frozen=True)
class Variant:
    """A method and how far it goes: one of the three, or none."""

    method: str
    share: float | None = None  # of weights, or channels, that go
    energy: float | None = None  # of squared singular values, that stays
    bits: int | None = None  # of each weight

    @property
    def name(self) -> str:
        """Of its folder: prune-0.5, lowrank-energy0.9, codebook-5bit, int8."""
        if self.share is not None:
            return f"{self.method}-{self.share:g}"
        if self.energy is not None:
            return f"{self.method}-energy{self.energy:g}"
        return self.method if self.bits is None else f"{self.method}-{self.bits}bit"


def make_variants(
    methods: str, shares: str | None = None, energies: str | None = None, bits: str | None = None
) -> list[Variant]:
    """Every method of a list such as "prune,lowrank" with each of its settings, lists as well.

    `energies` are lowrank's, in place of shares; `bits` are codebook's. Raises UserError for
    what is unknown, out of range, given twice, or for no method that is asked for.
    """
    names = [name.strip() for name in methods.split(",")]
    for name in names:
        if name not in METHODS:
            raise UserError(f"--method {name!a:.40} is none of {', '.join(METHODS)}")
    by_share = [n for n in names if n in _BY_SHARE and not (n == "lowrank" and energies)]
    _refuse_idle("--share", shares, by_share, "prune, structured, and lowrank without --energy")
    _refuse_idle("--energy", energies, [n for n in names if n == "lowrank"], "lowrank")
    _refuse_idle("--bits", bits, [n for n in names if n == "codebook"], "codebook")
    found = []
    for name in names:
        if name in by_share:
            found += [Variant(name, share=s) for s in _shares("--share", shares or DEFAULT_SHARE)]
        elif name == "lowrank":
            found += [Variant(name, energy=e) for e in _shares("--energy", energies or "")]
        elif name == "codebook":
            found += [Variant(name, bits=b) for b in _bits(bits or DEFAULT_BITS)]
        else:
            found.append(Variant(name))
    if twice := [v.name for i, v in enumerate(found) if v in found[:i]]:
        raise UserError(f"{twice[0]} is asked for twice; name each method and setting once")
    return found


def _refuse_idle(option: str, value: str | None, users: Sequence[str], whose: str) -> None:
    if value is not None and not users:
        raise UserError(f"{option} {value} is for {whose}; leave it out, or add such a --method")


def _shares(option: str, text: str) -> list[float]:
    values = [_number(option, part) for part in text.split(",")]
    for value in values:
        if not 0 < value < 1:
            raise UserError(f"{option} {value:g} must lie between 0 and 1, such as 0.5")
    return values


def _bits(text: str) -> list[int]:
    values = [_number("--bits", part) for part in text.split(",")]
    for value in values:
        if value not in range(1, 9):
            raise UserError(f"--bits {value:g} must be a whole number from 1 to 8")
    return [int(value) for value in values]


def _number(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{option} {text.strip()!a:.40} is no number") from None
