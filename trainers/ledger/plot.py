"""The losses of two runs, one over the other. Free of torch."""

from pathlib import Path

from bigbatch.configs.files import iter_jsonl
from bigbatch.configs.plot_style import BLUE, MUTED, ORANGE, plot_style
from bigbatch.configs.rundir import RunDir


def losses(run: RunDir) -> dict[int, float]:
    """The training loss by finished steps, where it is finite."""
    records = iter_jsonl(run.metrics, b'"train"')
    return {
        r["step"]: r["loss"]
        for r in records
        if r.get("kind") == "train" and r.get("loss") is not None
    }


@plot_style()
def draw_losses(runs: tuple[RunDir, RunDir], parting: int | None, path: Path) -> None:
    """Both losses, and by how much they differ; a line where the ledgers part. OSError."""
    import matplotlib.pyplot as plt  # slow

    both = [losses(run) for run in runs]
    common = sorted(both[0].keys() & both[1].keys())
    apart = [abs(both[1][step] - both[0][step]) for step in common]
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(8, 5.5), height_ratios=(3, 2))
    for name, run, values, colour, dashes in (
        ("A", runs[0], both[0], BLUE, "-"),
        ("B", runs[1], both[1], ORANGE, "--"),
    ):
        steps = sorted(values)
        label = f"{name} {run.name}"
        above.plot(steps, [values[s] for s in steps], dashes, color=colour, label=label)
    above.set(title="training loss", ylabel="loss")
    below.plot(common, apart, color=MUTED)
    below.set(title="|A - B|", xlabel="finished steps", ylabel="difference")
    below.set_ylim(bottom=0)
    if parting is not None:
        for axes in (above, below):
            axes.axvline(parting, color=MUTED, linewidth=1, linestyle=":")
        above.plot([], [], ":", color=MUTED, label=f"step {parting}: the ledgers part")
    above.legend()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
