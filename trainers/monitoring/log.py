"""What a run says about itself: metrics.jsonl, events.jsonl, and the views of them.

`metrics.jsonl` is the truth, keyed by step; the progress line, wandb and the report are
views of it. The lines of ledger.jsonl are made in trainers/ledger, the rows of samples.f16 in
trainers/dynamics. Only rank 0 writes. Free of torch.
"""

import os
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from bigbatch.configs.files import finite, iter_jsonl
from bigbatch.configs.json_text import parse_json
from bigbatch.configs.redact import redact
from bigbatch.configs.rundir import ROW_BYTES, RunDir, event_record
from bigbatch.configs.schema import Recipe
from bigbatch.trainers.monitoring.alerts import TITLES, Alerts, replay_command
from bigbatch.trainers.monitoring.jsonl import Appending, JsonLines
from bigbatch.trainers.monitoring.prometheus import TextFile
from bigbatch.trainers.monitoring.tensorboard_view import TensorBoardView
from bigbatch.trainers.monitoring.wandb_view import WandbView, open_wandb
from bigbatch.trainers.planning.sizes import image_sizes

if TYPE_CHECKING:
    from bigbatch.trainers.monitoring.progress import Progress

_TAIL = 1 << 16  # bytes of a file's end, to begin with


class Log:
    """Rank 0's records and views of one attempt of a run; on other ranks it does nothing.

    As a context manager it closes itself: with state "failed" where an exception passes
    through, otherwise with "stopped" unless `close` was called with a better word before.
    """

    def __init__(
        self,
        run: RunDir,
        recipe: Recipe,
        *,
        total_steps: int,
        epoch_samples: int,
        metrics: JsonLines | None,
        events: JsonLines | None,
        ledger: JsonLines | None = None,
        samples: Appending | None = None,
        progress: "Progress | None",
        wandb: WandbView | None,
        tensorboard: TensorBoardView | None = None,
        prometheus: TextFile | None = None,
    ) -> None:
        self._run = run
        self._every = recipe.log.every
        self._total_steps = total_steps
        self._timeline = recipe.timeline(epoch_samples)
        self._epochs_per_unit = self._timeline.unit / epoch_samples
        self._metrics = metrics
        self._events = events
        self._ledger = ledger
        self._samples = samples
        self._progress = progress
        self._wandb = wandb
        self._tensorboard = tensorboard
        self._prometheus = prometheus
        self._step = 0
        self._held_back = False
        self._closed = False
        self._alerts = Alerts()
        sizes = [first for first, _ in image_sizes(recipe, epoch_samples)]
        self._resized = {first + 1 for first in (*sizes, *self._timeline.starts[1:])}

    @property
    def wandb_path(self) -> Path | None:
        """The folder of this attempt's wandb run; None where wandb is off or failed."""
        return self._wandb.path if self._wandb else None

    def due(self, step: int) -> bool:
        """Whether the recipe asks for a train record after this many finished steps."""
        return step % self._every == 0 or step == self._total_steps

    def train(self, step: int, **values: Any) -> None:
        """Record one finished step: loss, lr, grad_norm, images_per_s, data_s, step_s.

        `step` is the number of finished steps. Steps that are not due move the progress
        line and leave no record. Where the batch changes, a record also has the step's
        global_batch, and the samples of all finished steps.
        """
        self._step = step
        if self._progress:
            self._progress.train(step, values)
        if self.due(step):
            if self._timeline.changes:
                batch, samples = self._timeline.batch(step - 1), self._timeline.first(step)
                values = {"global_batch": batch, "samples": samples, **values}
            self._record("train", step, values)
        if step in self._resized:
            self._alerts.forget_speed()
        if self._timeline.shrinks(step - 1):
            self._alerts.forget_losses()
        if self._events and "images_per_s" in values:
            for kind, fields in self._alerts.update(values["loss"], values["images_per_s"]):
                self.event(kind, **fields)

    def evaluation(self, step: int, split: str, **values: float) -> None:
        """Record an evaluation after `step` finished steps: accuracy, nll, ece.

        Call it before the checkpoint of the same step is written: a resume keeps the
        records up to its step and evaluates no step a second time.
        """
        if self._progress:
            self._progress.evaluation(split, values)
        self._record("eval", step, values, split=split)

    def detail(self, step: int, kind: str, **values: Any) -> None:
        """Record what is not measured in every step: kind "ranks", "trust" or "system"."""
        self._record(kind, step, values)

    def ledger(self, line: dict[str, Any]) -> None:
        """Append a line to ledger.jsonl. One that the disk holds back comes later, in its place."""
        if self._ledger:
            self._ledger.append(line)

    def samples(self, rows: bytes) -> None:
        """Append the rows of a step to samples.f16; what the disk holds back comes later."""
        if self._samples:
            self._samples.append_bytes(rows)

    def event(self, kind: str, **fields: Any) -> None:
        """Append to events.jsonl: when, what, after how many steps, and any plain values."""
        if self._events:
            record = redact(event_record(kind, self._step) | fields)
            if command := replay_command(self._run.name, record):
                record["replay"] = command
            self._events.append(record)
            if self._prometheus:
                self._prometheus.event(kind)
            if self._wandb and kind in TITLES:
                self._wandb.alert(TITLES[kind], record)

    def picture(self, name: str, path: Path) -> None:
        """Show a picture of the run in wandb; the report takes it from the run directory."""
        if self._wandb:
            self._wandb.picture(name, path)

    def error(self, kind: str, message: str, **fields: Any) -> None:
        """Record and show what went wrong where training goes on."""
        self.event(kind, error=message, **fields)
        if self._progress:
            self._progress.warn(message)

    def phase(self, text: str) -> None:
        """Say what the run is doing between steps: "evaluating", "saving", ..."""
        if self._progress:
            self._progress.phase(text)

    def sync(self) -> None:
        """Put the records on the disk; a checkpoint must not outlive them. From any thread."""
        for file in (self._metrics, self._events, self._ledger, self._samples):
            if file:
                file.sync()

    def end_progress(self) -> None:
        """Leave the terminal to others."""
        if self._progress:
            self._progress.close()

    def close(self, state: str) -> None:
        """Record the last event, `state` (finished, stopped or failed), and close every view."""
        if self._closed:
            return
        self._closed = True
        self.end_progress()
        self.event("end", state=state)
        if self._wandb:
            self._wandb.end(state, self._run.summary)
            self._wandb.close()
            self._report_wandb()
        if self._tensorboard:
            self._tensorboard.close()
            self._report_tensorboard()
        if self._prometheus:
            self._prometheus.close()
        for file in (self._metrics, self._events, self._ledger, self._samples):
            if file:
                file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None and not self._closed:
            self.event("error", error=f"{kind.__name__}: {error}")
        self.close("failed" if kind is not None else "stopped")

    def _record(self, kind: str, step: int, values: dict[str, Any], **keys: Any) -> None:
        if self._metrics is None:
            return
        epoch = round(self._timeline.units(step) * self._epochs_per_unit, 6)
        record = finite({"kind": kind, "step": step, **keys, "epoch": epoch, **values})
        held_back = self._metrics.append(record)
        if held_back and not self._held_back:
            self.error("disk", f"{self._run.metrics} waits for the disk: {held_back}")
        self._held_back = held_back is not None
        if self._wandb:
            self._wandb.send(record)
            self._report_wandb()
        if self._tensorboard:
            self._tensorboard.send(record)
            self._report_tensorboard()
        if self._prometheus and (refusal := self._prometheus.record(record)):
            self.error("prometheus", refusal)

    def _report_tensorboard(self) -> None:
        assert self._tensorboard is not None
        for message in self._tensorboard.problems():
            self.error("tensorboard", f"tensorboard/ is not complete: {message}")

    def _report_wandb(self) -> None:
        """Turn what went wrong inside wandb into events and warnings; training goes on."""
        assert self._wandb is not None
        for message in self._wandb.problems():
            self.error("wandb", f"wandb: {message}")


def open_log(
    run: RunDir,
    recipe: Recipe,
    *,
    rank: int,
    total_steps: int,
    start_step: int,
    epoch_samples: int,
) -> Log:
    """Open the log of one attempt, which starts after `start_step` finished steps.

    Records beyond `start_step` are cut off first, so that each step stands in metrics.jsonl
    exactly once however often the run was killed. `epoch_samples` is the number of samples
    in one epoch of the order policy.
    """
    if rank != 0:
        return Log(
            run,
            recipe,
            total_steps=total_steps,
            epoch_samples=epoch_samples,
            metrics=None,
            events=None,
            progress=None,
            wandb=None,
        )
    from bigbatch.trainers.monitoring.progress import Progress  # rich, for rank 0 alone

    cut_records(run.metrics, start_step)
    cut_records(run.ledger, start_step)
    seen = recipe.timeline(epoch_samples).first(start_step)
    cut_rows(run.samples, seen, recording=recipe.log.samples)
    prometheus = recipe.log.prometheus
    log = Log(
        run,
        recipe,
        total_steps=total_steps,
        epoch_samples=epoch_samples,
        metrics=JsonLines(run.metrics),
        events=JsonLines(run.events),
        ledger=JsonLines(run.ledger) if recipe.log.ledger_every else None,
        samples=Appending(run.samples) if recipe.log.samples else None,
        progress=Progress(
            run.name, total_steps, start_step, work=recipe.timeline(epoch_samples).first
        ),
        wandb=open_wandb(run, recipe, recipe.log.wandb, start_step),
        tensorboard=TensorBoardView(run, start_step) if recipe.log.tensorboard else None,
        prometheus=TextFile(Path(prometheus), run.name, total_steps) if prometheus else None,
    )
    log._step = start_step
    if log._wandb:
        for event in stalls(run.events):
            log._wandb.alert(TITLES["stall"], redact(event))
    return log


def stalls(events: Path) -> list[dict[str, Any]]:
    """The hangs since the last start, of which wandb has not heard.

    The watchdog ends a process that hangs, and perhaps it is another rank's that can still
    write; waiting for wandb there would keep the queue waiting. So the next start tells it.
    """
    found: list[dict[str, Any]] = []
    for event in iter_jsonl(events, b'"start"', b'"stall"'):
        if event.get("kind") == "start":
            found = []
        elif event.get("kind") == "stall":
            found.append(event)
    return found


def cut_records(records: Path, step: int) -> None:
    """Drop the records beyond `step`, and a torn line; the rest stays byte for byte.

    They are the end of the file, in which steps rise: no more than that is read, of a file of any
    size, and cut off at once, for which a full disk has room.
    """
    if not records.exists():
        return
    with records.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        at, data, stop = end, b"", 0  # data[:stop] are the bytes from `at` on that are looked at
        while stop or at:
            first = data.rfind(b"\n", 0, max(0, stop - 1)) + 1
            if not first and at:
                start = max(0, at - max(_TAIL, stop))
                file.seek(start)
                data = file.read(at - start) + data[:stop]
                stop += at - start
                at = start
                continue
            if _stands(data[first:stop], step):
                break
            stop = first
        if at + stop < end:
            file.truncate(at + stop)
            os.fsync(file.fileno())


def cut_rows(samples: Path, seen: int, *, recording: bool) -> None:
    """Drop the rows of samples.f16 beyond the first `seen` samples; where a run goes on recording,
    rows that are missing there become a hole, which says so."""
    size = seen * ROW_BYTES
    if recording:
        samples.touch()
    if samples.exists() and (recording or samples.stat().st_size > size):
        os.truncate(samples, size)


def last_step(metrics: Path) -> int:
    """The last step that has a record; 0 without any."""
    newest = iter_jsonl(metrics, newest_first=True)
    return next((int(r["step"]) for r in newest if "step" in r), 0)


def _stands(line: bytes, step: int) -> bool:
    """Whether a line is a whole record of at most `step` finished steps."""
    try:
        return line.endswith(b"\n") and int(parse_json(line)["step"]) <= step
    except (ValueError, LookupError, TypeError, OverflowError):
        return False
