"""The picture of a sweep shows every step that it took."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bigbatch.trainers.advice.lr_range import RangeTest, draw


def drawn(loss: np.ndarray, path: Path, monkeypatch: pytest.MonkeyPatch) -> Axes:
    """The axes of the picture of a sweep with these losses."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    rates = np.geomspace(1e-3, 10, len(loss))
    draw(RangeTest(rates, loss, loss, True, 0.1, 0.05), "digits", path)
    (axes,) = figures[0].axes
    return axes


@pytest.mark.parametrize("top", [2.4, 9.0, 1e6])
def test_no_step_is_cut_off(tmp_path: Path, top: float, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = np.concatenate([np.linspace(2.3, 0.4, 40), np.linspace(0.5, top, 10)])
    axes = drawn(loss, tmp_path / "lr.png", monkeypatch)
    low, high = axes.get_ylim()
    points = [line for line in axes.lines if line.get_marker() in (".", "^")]
    shown = np.concatenate([np.asarray(line.get_ydata(), float) for line in points])
    assert len(shown) == len(loss)
    assert low < shown.min() <= shown.max() < high
    assert high < 12  # the fall stays readable however high the leap is
    above = [line.get_label() for line in points if line.get_marker() == "^"]
    beyond = int((loss > 0.4 + 3 * 1.9).sum())
    told = f"{beyond} step{'s' * (beyond > 1)} above, up to {top:.3g}"
    assert above == ([told] if beyond else [])
