"""The picture: which points are beaten by none, and that it can be drawn of anything."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bigbatch.trainers.compress.picture import draw, pareto

POINT = st.tuples(st.integers(1, 5), st.integers(0, 5))


@given(st.lists(POINT, min_size=1, max_size=12))
def test_the_front_holds_each_point_that_none_beats_once(points: list[tuple[int, int]]) -> None:
    costs, gains = [float(c) for c, _ in points], [float(g) for _, g in points]
    front = [points[i] for i in pareto(costs, gains)]
    unbeaten = {
        (c, g)
        for c, g in points
        if not any(a <= c and b >= g and (a, b) != (c, g) for a, b in points)
    }
    assert front == sorted(unbeaten)


def result(rows: int) -> dict[str, object]:
    methods = [None, "prune", "structured", "lowrank", "codebook"]
    scores = {"accuracy": 0.5, "interval": (0.4, 0.6)}
    return {
        "member": "$a_run/cycle-01",
        "settings": {"finetune": None},
        "machine": {"device": "cpu", "threads": 2},
        "splits": {"val": {"samples": 12}},
        "results": [
            {
                "name": str(i), "method": methods[i % 5], "runtime": "torch", "share": 0.5,
                "gzip_bytes": 10**i, "latency_ms": {"1": 1.0 + i, "64": 2.0},
                "splits": {"val": scores},
            }
            for i in range(rows)
        ],
    }  # fmt: skip


def test_is_drawn_of_a_single_point_whose_name_is_no_formula(tmp_path: Path) -> None:
    draw(result(1), tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size == (1584, 576)
