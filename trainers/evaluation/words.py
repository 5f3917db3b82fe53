"""What statistics say, in sentences: for the terminal and for the report."""

from collections.abc import Iterator, Mapping
from typing import Any


def in_words(statistics: Mapping[str, Any]) -> list[str]:
    """A line for each thing that a table of scores leaves out and these statistics have."""
    return [*_members(statistics), *_answers(statistics), *_cost(statistics.get("cost"))]


def _members(statistics: Mapping[str, Any]) -> Iterator[str]:
    if statistics["members"] is None:
        return
    against = statistics["members"]["against_best"]
    accuracy, p = against["accuracy"], against["mcnemar"]["p_value"]
    low, high = accuracy["interval"]
    chosen = "" if against["chosen_on"] == "other samples" else " (best of these samples)"
    yield (
        f"ensemble minus {against['best']}{chosen}: {100 * accuracy['difference']:+.2f} points of "
        f"accuracy (95 %: {100 * low:+.2f} to {100 * high:+.2f}; McNemar p = {p:.2g}), "
        f"{against['nll']['difference']:+.4f} nll"
    )


def _answers(statistics: Mapping[str, Any]) -> Iterator[str]:
    if (temperature := statistics["temperature"]) is not None:
        yield (
            f"temperature {temperature:.3f}, in the ensemble's nll and ece; members are without, "
            "and so is the comparison with them"
        )
    if rejection := statistics["rejection"]:
        right = rejection["accuracy"]
        said = "none" if right is None else f"{right:.2%} of them right"
        yield (
            f"confidence below {rejection['below']:.6g} is rejected: {rejection['coverage']:.1%} "
            f"answered, {said}; accuracy above is of all"
        )
    for sets in statistics["conformal"] or ():
        low, high = sets["coverage_interval"]
        yield (
            f"sets of classes ({sets['method']}) for {sets['level']:.0%}: {sets['coverage']:.1%} "
            f"hold the label (95 %: {low:.1%} to {high:.1%}), with {sets['mean_size']:.2f} classes "
            f"on average, {sets['largest']} at most"
        )


def _cost(cost: Mapping[str, Any] | None) -> Iterator[str]:
    if not cost:
        return
    flops = cost["flops_per_image"]
    said = [] if flops is None else [f"{flops / 1e6:,.3g} MFLOPs an image"]
    said += [f"{cost['parameters']:,} parameters", f"{cost['images_per_s']:,.0f} images/s"]
    if cost["peak_memory"] is not None:
        said.append(f"peak memory {cost['peak_memory'] / 2**20:,.0f} MiB")
    yield f"cost: {', '.join(said)}"
