"""Numbers and nouns as people are told them."""


def plural(count: float, noun: str) -> str:
    """A count with its noun: 1 class, 1,024 classes, 0.5 epochs."""
    number = f"{count:,}" if isinstance(count, int) else f"{count:,g}"
    return f"{number} {noun}" if count == 1 else f"{number} {_several(noun)}"


def span(low: int, high: int) -> str:
    """From a number to another one: 3 to 1,024; one number where both are the same."""
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _several(noun: str) -> str:
    if noun.endswith(("s", "x", "tch", "nch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2:-1] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"
