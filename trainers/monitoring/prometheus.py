"""The newest figures of a run as a text file for Prometheus. Free of torch.

node_exporter's textfile collector reads `bigbatch-RUN.prom` in the folder that the recipe
names (https://github.com/prometheus/node_exporter#textfile-collector). The file is replaced
as a whole, so that a scrape never meets half of one. docs/monitoring.md lists the metrics.
"""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import write_atomically
from bigbatch.configs.judged import ACCURACY, judged_in

INTERVAL = 15.0  # seconds between two writes: Prometheus scrapes about as often
GAUGES = {
    "bigbatch_step": "Finished steps.",
    "bigbatch_total_steps": "Steps that the recipe asks for.",
    "bigbatch_epoch": "Finished epochs.",
    "bigbatch_loss": "Training loss of the last recorded step.",
    "bigbatch_learning_rate": "Learning rate of the last recorded step.",
    "bigbatch_gradient_norm": "L2 norm of the gradient before clipping.",
    "bigbatch_images_per_second": "Images trained on in a second, over all ranks.",
    "bigbatch_step_seconds": "Wall time of the last recorded step.",
    "bigbatch_mfu_ratio": "Model FLOPs utilisation, from 0 to 1.",
    "bigbatch_noise_scale_samples": "Gradient noise scale B_simple.",
    "bigbatch_phase_seconds": "Time of a step in a phase, mean of the ranks.",
    "bigbatch_rank_phase_seconds": "Time of a step in a phase, by rank.",
    "bigbatch_accuracy_ratio": "Accuracy of the last evaluation, from 0 to 1.",
    "bigbatch_score": "Last evaluation of a run that is not judged by accuracy, by the score.",
    "bigbatch_running": "1 while the run trains, 0 once it has ended.",
    "bigbatch_last_record_timestamp_seconds": "Unix time of the last record.",
}
COUNTERS = {"bigbatch_events_total": "Events of this attempt, by kind."}
_TRAIN = {
    "step": "bigbatch_step",
    "epoch": "bigbatch_epoch",
    "loss": "bigbatch_loss",
    "lr": "bigbatch_learning_rate",
    "grad_norm": "bigbatch_gradient_norm",
    "images_per_s": "bigbatch_images_per_second",
    "step_s": "bigbatch_step_seconds",
    "mfu": "bigbatch_mfu_ratio",
    "noise_scale": "bigbatch_noise_scale_samples",
}
Labels = tuple[tuple[str, str], ...]


class TextFile:
    """One run's file; rank 0 writes it."""

    def __init__(self, folder: Path, run: str, total_steps: int) -> None:
        if not folder.is_dir():
            raise UserError(
                f"log.prometheus = {str(folder)!r} is no folder on this machine; name the one "
                "that node_exporter got as --collector.textfile.directory"
            )
        self.path = folder / f"bigbatch-{run}.prom"
        self._run = run
        self._values: dict[tuple[str, Labels], float] = {}
        self._written = float("-inf")
        self._set("bigbatch_total_steps", total_steps)
        self._set("bigbatch_running", 1)

    def record(self, record: Mapping[str, Any]) -> str | None:
        """Take a record of metrics.jsonl; says why the file cannot be written, if it cannot."""
        if record["kind"] == "train":
            for key, name in _TRAIN.items():
                self._set(name, record.get(key))
            for phase, seconds in record.get("phases", {}).items():
                self._set("bigbatch_phase_seconds", seconds, phase=phase)
        elif record["kind"] == "eval":
            split, judge = record["split"], judged_in(record) or ACCURACY
            value = record.get(judge.key)
            if judge == ACCURACY:
                self._set("bigbatch_accuracy_ratio", value, split=split)
            else:
                self._set("bigbatch_score", value, split=split, score=judge.key)
        elif record["kind"] == "ranks":
            for rank, row in enumerate(record["seconds"]):
                for phase, seconds in zip(record["phases"], row, strict=True):
                    name = "bigbatch_rank_phase_seconds"
                    self._set(name, seconds, rank=str(rank), phase=phase)
        self._set("bigbatch_last_record_timestamp_seconds", time.time())
        if time.monotonic() - self._written < INTERVAL:
            return None
        return self._write()

    def event(self, kind: str) -> None:
        key = ("bigbatch_events_total", self._labels({"kind": kind}))
        self._values[key] = self._values.get(key, 0.0) + 1

    def close(self) -> str | None:
        self._set("bigbatch_running", 0)
        return self._write()

    def _labels(self, labels: Mapping[str, str]) -> Labels:
        return (("run", self._run), *labels.items())

    def _set(self, name: str, value: float | None, **labels: str) -> None:
        key = (name, self._labels(labels))
        if value is None:  # it was not finite: no number is better than an old one
            self._values.pop(key, None)
        else:
            self._values[key] = value

    def _write(self) -> str | None:
        self._written = time.monotonic()
        try:
            write_atomically(self.path, "".join(f"{line}\n" for line in self._lines()))
        except OSError as error:
            return f"cannot write {self.path}: {error}"
        return None

    def _lines(self) -> Iterator[str]:
        for kind, names in (("gauge", GAUGES), ("counter", COUNTERS)):
            for name, text in names.items():
                samples = [(labels, v) for (n, labels), v in self._values.items() if n == name]
                if samples:
                    yield f"# HELP {name} {text}"
                    yield f"# TYPE {name} {kind}"
                for labels, value in samples:
                    inner = ",".join(f'{key}="{_escaped(v)}"' for key, v in labels)
                    yield f"{name}{{{inner}}} {float(value)!r}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
