"""wandb as a view of metrics.jsonl. The only module that imports wandb.

All of wandb happens on one thread, so that neither its import, nor its start, nor a slow
network ever holds up a step; no error of wandb's reaches the run.

Each step reaches wandb exactly once, also after a kill. wandb-core buffers what it writes,
so what a killed attempt handed over is no guide to what was kept. On resume the view
therefore asks what is really there (online the server, offline the run's own .wandb files)
and replays the missing steps from metrics.jsonl. The own axis train/step stands beside
wandb's, which cannot be rewound: wandb drops rows below its last step (wandb #4482).
"""

import json
import netrc
import os
import queue
import re
import secrets
import shutil
import struct
import threading
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bigbatch.configs.files import iter_jsonl, to_json, write_atomically
from bigbatch.configs.identity import recipe_hash
from bigbatch.configs.redact import redact
from bigbatch.configs.rundir import RunDir
from bigbatch.configs.schema import Recipe

INIT_TIMEOUT = 60.0  # seconds without an answer after which the attempt goes on offline
# Seconds that the end of an attempt waits for uploads. One stopped by a signal has little
# time, and loses nothing: the next attempt, or `wandb sync`, sends the rest.
CLOSE_TIMEOUT = {"finished": 60.0, "stopped": 10.0, "failed": 10.0}

_SHOWN_RANKS = 16

_HEADER = b":W&B"
_BLOCK = 32768  # bytes; the .wandb file is a LevelDB log (wandb, core/internal/leveldb)
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


class WandbView:
    """One attempt's wandb run, fed through a queue."""

    def __init__(self, run: RunDir, recipe: Recipe, mode: str, start_step: int) -> None:
        self.path: Path | None = None
        self._run = run
        self._recipe = recipe
        self._mode = mode
        self._start_step = start_step
        self._rows: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._problems: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._end: tuple[str, Path] | None = None
        self._thread = threading.Thread(target=self._main, name="wandb", daemon=True)
        self._thread.start()

    def send(self, record: dict[str, Any]) -> None:
        """Hand over one record of metrics.jsonl; never blocks."""
        if self._thread.is_alive():  # otherwise wandb failed, and nobody empties the queue
            self._rows.put(record)

    def alert(self, title: str, event: dict[str, Any]) -> None:
        """Hand over an event for wandb to send on to the user; never blocks."""
        if self._thread.is_alive():
            self._rows.put({"kind": "alert", "title": title, "event": event})

    def picture(self, name: str, path: Path) -> None:
        """Hand over a picture of the run; never blocks."""
        if self._thread.is_alive():
            self._rows.put({"kind": "picture", "name": name, "path": path})

    def problems(self) -> Iterator[str]:
        """What went wrong since the last call, one message each."""
        while True:
            try:
                yield self._problems.get_nowait()
            except queue.Empty:
                return

    def end(self, state: str, summary: Path) -> None:
        """Send what is left and finish the run, with the figures of summary.json if there are."""
        self._end = (state, summary)
        self._rows.put(None)

    def close(self) -> None:
        """Wait until what `end` asked for is done."""
        assert self._end is not None
        patience = CLOSE_TIMEOUT[self._end[0]]
        self._thread.join(patience)
        if self._thread.is_alive():
            self._problems.put(f"not done within {patience:.0f} s; `wandb sync` sends the rest")

    def _main(self) -> None:
        try:
            self._follow()
        except Exception as error:  # whatever wandb raises, the run goes on without it
            self._problems.put(f"{type(error).__name__}: {error}")

    def _follow(self) -> None:
        folder = self._run.path / "wandb"
        mend(folder)
        kept = _last_step(folder)
        wandb_run = self._start()
        self.path = folder / Path(wandb_run.settings.sync_dir).name
        wandb_run.define_metric("train/step")
        wandb_run.define_metric("*", step_metric="train/step")
        sent = wandb_run.starting_step - 1 if self._mode == "online" else kept

        row: dict[str, float] = {}
        past = (r for r in iter_jsonl(self._run.metrics) if r["step"] <= self._start_step)
        for record in chain(past, iter(self._rows.get, None)):
            if record["kind"] == "alert":
                self._alert(wandb_run, record["title"], record["event"])
                continue
            if record["kind"] == "picture":
                # In the summary, not the history: it belongs to no step.
                wandb_run.summary[record["name"]] = _image(record["path"])
                continue
            # A row is sent when it is whole, so that a kill never leaves half of one.
            if row and record["step"] != row["train/step"]:
                wandb_run.log(row, step=int(row["train/step"]), commit=True)
                row = {}
            if record["step"] > sent:
                row |= flat_row(record)
        if row:
            wandb_run.log(row, step=int(row["train/step"]), commit=True)

        assert self._end is not None
        state, summary = self._end
        if summary.is_file():
            wandb_run.summary.update(_flat(json.loads(summary.read_text(encoding="utf-8"))))
        if state == "stopped":
            wandb_run.mark_preempting()  # the server then shows "preempted", not "failed"
        wandb_run.finish(exit_code=0 if state == "finished" else 1)

    def _alert(self, wandb_run: Any, title: str, event: dict[str, Any]) -> None:
        known = ("time", "date", "kind", "step", "pid")
        details = ", ".join(f"{k} {v}" for k, v in event.items() if k not in known)
        text = f"{self._run.name}, step {event['step']}, {event['date']}: {details}"
        bad = event.get("state") not in ("finished", "stopped")
        wandb_run.alert(title=title, text=text, level="WARN" if bad else "INFO", wait_duration=0)

    def _start(self) -> Any:
        import wandb

        wandb.setup(settings=wandb.Settings(silent=True))  # logging in is not silent otherwise
        if self._mode == "online":
            try:
                return self._init(wandb)
            except Exception as error:  # no network, no permission: keep the data, say so
                self._problems.put(f"{error}; going on offline")
                self._mode = "offline"
                wandb.teardown()  # its service still holds the run id of the failed start
        return self._init(wandb)

    def _init(self, wandb: Any) -> Any:
        config = self._recipe.model_dump(mode="json") | {"recipe_hash": recipe_hash(self._recipe)}
        return wandb.init(
            project=self._recipe.log.project,
            name=self._run.name,
            id=_run_id(self._run),
            resume="allow",
            mode=self._mode,
            # Its service may be one that another process has started, in another folder: of a path
            # that is relative it would make one there, and lose what it is told.
            dir=str(self._run.path.absolute()),
            config=redact(config),
            settings=wandb.Settings(silent=True, console="off", init_timeout=INIT_TIMEOUT),
        )


def open_wandb(run: RunDir, recipe: Recipe, mode: str, start_step: int = 0) -> WandbView | None:
    """Start following a run in wandb; None where `mode` is "off".

    "auto" is online where the user is logged in (WANDB_API_KEY or netrc) and otherwise
    offline. WANDB_MODE, wandb's own switch, may still turn it offline or off. One run id,
    kept in the run directory, serves every attempt.
    """
    switch = os.environ.get("WANDB_MODE", "")
    if mode == "off" or switch == "disabled":
        return None
    problem = ""
    if switch == "offline":
        mode = "offline"
    elif not logged_in():
        if mode == "online":
            problem = (
                "log.wandb is online, but nobody is logged in (`wandb login`); staying offline"
            )
        mode = "offline"
    elif mode == "auto":
        mode = "online"
    view = WandbView(run, recipe, mode, start_step)
    if problem:
        view._problems.put(problem)
    return view


def logged_in() -> bool:
    """Whether wandb would find credentials for its server without asking for them."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    path = os.environ.get("NETRC") or Path.home() / ".netrc"
    try:
        return netrc.netrc(str(path)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def history_steps(file: Path) -> Iterator[int]:
    """train/step of each history row in a .wandb file, in file order."""
    from wandb.proto import wandb_internal_pb2

    protocol: Any = wandb_internal_pb2  # generated code without types
    for _, payload in _payloads(file.read_bytes()):
        record = protocol.Record.FromString(payload)
        for item in record.history.item:
            if "/".join(item.nested_key) == "train/step" or item.key == "train/step":
                yield int(float(item.value_json))


def mend(folder: Path) -> None:
    """Make what killed attempts left in a wandb folder fit for `wandb sync`.

    `wandb sync` stops at a file that ends in half a record, or holds none, and then leaves
    out the later attempts of the run too (seen with 0.31). So half a record is cut off, and
    a file without any row is removed with its folder: its rows will be replayed.
    """
    for file in folder.glob("*run-*/*.wandb"):
        if not any(True for _ in history_steps(file)):
            shutil.rmtree(file.parent)
            continue
        data = file.read_bytes()
        end = max(end for end, _ in _payloads(data))
        if end < len(data):
            with file.open("r+b") as opened:
                opened.truncate(end)


def _payloads(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(end, payload) of each whole record in a .wandb file.

    wandb's Python package reads these files no more (only its Go core does), so the framing
    is read here: a 7-byte file header, then blocks of 32 KiB with pieces of
    (crc u32, length u16, type u8, payload); a record is one full piece, or several.
    """
    if not data.startswith(_HEADER):
        return
    at, whole = 7, b""
    while at + 7 <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < 7:  # the header of a piece never crosses into the next block
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        piece = data[at + 7 : at + 7 + size]
        at += 7 + size
        if at > len(data) or kind not in (_FULL, _FIRST, _MIDDLE, _LAST):
            return  # cut short by a kill
        whole = piece if kind in (_FULL, _FIRST) else whole + piece
        if kind in (_FULL, _LAST):
            yield at, whole


def _last_step(folder: Path) -> int:
    """The last step that the former attempts' .wandb files hold; -1 where there is none."""
    files = folder.glob("*run-*/*.wandb")
    return max((step for file in files for step in history_steps(file)), default=-1)


def _image(path: Path) -> Any:
    import wandb

    return wandb.Image(str(path))


def _run_id(run: RunDir) -> str:
    file = run.path / "wandb.json"
    if not file.is_file():
        readable = re.sub(r"[^A-Za-z0-9_-]", "-", run.name)[:40]
        write_atomically(file, to_json({"id": f"{readable}-{secrets.token_hex(4)}"}) + "\n")
    return str(json.loads(file.read_text(encoding="utf-8"))["id"])


def flat_row(record: dict[str, Any]) -> dict[str, float]:
    """A record of metrics.jsonl under wandb's names: train/loss, val/accuracy, ..."""
    group = record.get("split", "train")
    own = ("ranks", "trust", "system", "gradients", "probe", "confusion", "targets")
    if record["kind"] in own:
        group = record["kind"]
    values = {k: v for k, v in record.items() if k not in ("kind", "step", "split", "epoch")}
    if group == "ranks":
        values = _by_rank(record)
    row = {f"{group}/{k}": v for k, v in _flat(values).items() if v is not None}
    return row | {"train/step": record["step"], "train/epoch": record["epoch"]}


def _by_rank(record: dict[str, Any]) -> dict[str, Any]:
    """Seconds as {"data": {"0": 0.1, "1": 0.2}}, for as many ranks as a chart can show."""
    columns = zip(*record["seconds"][:_SHOWN_RANKS], strict=True)
    seconds = zip(record["phases"], columns, strict=True)
    return {phase: {str(r): value for r, value in enumerate(column)} for phase, column in seconds}


def _flat(summary: dict[str, Any]) -> dict[str, Any]:
    """summary.json as "test/ensemble/accuracy": 0.98, and so on; members are left out."""
    flat: dict[str, Any] = {}
    for key, value in summary.items():
        if isinstance(value, dict):
            flat |= {f"{key}/{inner}": v for inner, v in _flat(value).items()}
        elif not isinstance(value, list):
            flat[key] = value
    return flat
