"""How every plot looks: the report's, and the pictures that commands write."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# The colours of report.html in light mode.
INK, MUTED, GRID = "#1b2430", "#5b6675", "#e1e5ea"
BLUE, ORANGE, GREEN = "#1f6fc4", "#c2540a", "#18794e"


def style(ink: str, muted: str, grid: str) -> dict[str, Any]:
    """Settings of matplotlib, in these colours of text, of what is beside it, and of lines."""
    return {
        "text.parse_math": False,  # a class may be called $x$
        "font.size": 11,
        "axes.titlesize": 12,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": grid,
        "axes.labelcolor": muted,
        "axes.titlecolor": ink,
        "text.color": ink,
        "xtick.color": muted,
        "ytick.color": muted,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": grid,
        "grid.linewidth": 0.8,
        "lines.linewidth": 1.8,
        "lines.solid_capstyle": "round",
        "legend.frameon": False,
        "legend.fontsize": 10.5,
        "legend.labelcolor": muted,
    }


@contextmanager
def plot_style() -> Iterator[None]:
    """Draws what is made inside for files of their own; also a decorator, @plot_style()."""
    import matplotlib as mpl  # slow
    from cycler import cycler

    colours = cycler(color=[BLUE, ORANGE, GREEN, MUTED])
    settings: Any = style(INK, MUTED, GRID) | {"axes.prop_cycle": colours, "savefig.dpi": 120}
    with mpl.rc_context(settings):
        yield
