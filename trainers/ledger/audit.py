"""Whether a run's records and checkpoints are what its ledger says. Free of torch.

It shows that files agree with each other, not that training was honest: who writes the ledger anew
can make it agree with anything.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import iter_jsonl, to_json
from bigbatch.configs.json_text import parse_json
from bigbatch.configs.rundir import RunDir
from bigbatch.configs.words import plural
from bigbatch.trainers.ledger.lines import Ledger, loss_bits, loss_of
from bigbatch.trainers.ledger.multipliers import MASK, digest_bytes, digest_value
from bigbatch.trainers.models.weights_file import METADATA, WIDTHS, read_header
from bigbatch.trainers.recovery.stored import (
    MODEL,
    OPTIMIZER,
    STATE,
    STATISTICS,
    CorruptCheckpoint,
    list_checkpoints,
    step_of,
    verify,
)

NOT_RECOMPUTED = "no step was computed again: that the digests follow from the recipe is not shown"
_NOT_COVERED = (
    "averages, snapshots, evaluations and what was recorded after the last save are not covered"
)
_GONE = "the run, which goes on, has removed it meanwhile"


@dataclass
class Audit:
    """What was looked at, and what was found wrong."""

    run: str
    steps: int = 0  # lines of the chain
    losses: int = 0  # records of metrics.jsonl compared with it
    saves: int = 0  # states of metrics.jsonl compared with their SHA-256
    checkpoints: list[int] = field(default_factory=list)  # steps whose tensors were digested
    findings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    not_shown: list[str] = field(default_factory=lambda: [NOT_RECOMPUTED, _NOT_COVERED])

    @property
    def passed(self) -> bool:
        return not self.findings

    def as_json(self) -> dict[str, Any]:
        return {"passed": self.passed, **asdict(self)}


def in_words(found: Audit) -> list[str]:
    """What was checked and found, a line each, but for the verdict."""
    steps = ", ".join(map(str, found.checkpoints)) or "none"
    lines = [
        f"ledger: {plural(found.steps, 'step')}, each of which follows from those before it",
        f"metrics.jsonl: {plural(found.losses, 'loss')} bit for bit, "
        f"{plural(found.saves, 'save')} by SHA-256",
        f"checkpoints: weights, optimizer and statistics of steps {steps}",
    ]
    lines += [f"note: {line}" for line in found.notes]
    lines += [f"not shown: {line}" for line in found.not_shown]
    return lines + [f"CHANGED: {line}" for line in found.findings]


def audit(run: RunDir, ledger: Ledger) -> Audit:
    """Check a run against its ledger, which `read_ledger` has read. UserError where it is no run,
    or the ledger holds no step."""
    every = run.recipe().log.ledger_every
    if not ledger.steps and ledger.broken is None:
        raise UserError(
            f"{ledger.path} holds no step, so there is nothing to check against: the run has "
            "finished none that has a line (log.ledger_every), or the file was emptied"
        )
    found = Audit(str(run.path), steps=len(ledger.steps))
    if ledger.broken is not None:
        found.findings.append(f"{ledger.path}: {ledger.broken}")
    recorded = _check_losses(run.metrics, ledger, found)
    last = max(ledger.steps, default=0)
    if ledger.broken is None and every is not None and recorded > last + every:
        found.notes.append(
            f"metrics.jsonl goes on to step {recorded}, the ledger to step {last}: the end of the "
            "ledger is missing, and nothing after it is checked"
        )
    _check_records(run.metrics, ledger, found)
    origin = run.forked_from
    for path in reversed(list_checkpoints(run.checkpoints)):
        try:
            _check_checkpoint(path, ledger, found, None if origin is None else origin["at"])
        except OSError as error:
            if path.is_dir():
                found.findings.append(f"{path} cannot be read: {error}")
            else:
                found.notes.append(f"{path} is not checked: {_GONE}")
    return found


def _check_losses(metrics: Path, ledger: Ledger, found: Audit) -> int:
    """Returns the last step that has a record."""
    last = 0
    for record in iter_jsonl(metrics, b'"train"'):
        step = record.get("step")
        if record.get("kind") != "train" or type(step) is not int:
            continue
        last = max(last, step)
        line = ledger.steps.get(step)
        if line is None:
            continue
        found.losses += 1
        loss, bits = record.get("loss"), line.digests["loss"]
        value = loss_of(bits)
        if loss is None and not math.isfinite(value):
            continue
        if not isinstance(loss, float) or loss_bits(loss) != bits:
            found.findings.append(
                f"{metrics}: step {line.step} has loss {loss!r:.40}, the ledger says {value!r}"
            )
    return last


def _check_records(metrics: Path, ledger: Ledger, found: Audit) -> None:
    """The file as it was at each save is a beginning of what it is now."""
    digest, position = hashlib.sha256(), 0
    before: Any = 0
    try:
        file = metrics.open("rb")
    except OSError as error:
        found.findings.append(f"{metrics} cannot be read: {error}")
        return
    with file:
        for line in ledger.records:
            step, size = line.get("step"), line.get("bytes")
            if not isinstance(size, int) or size < position:
                found.findings.append(f"{ledger.path}: a line of kind records is out of order")
                return
            while position < size and (block := file.read(min(1 << 20, size - position))):
                digest.update(block)
                position += len(block)
            if digest.hexdigest() != line.get("sha256"):
                found.findings.append(
                    f"{metrics} is not what it was at the save of step {step}: a record after "
                    f"step {before}, or of it, was changed, added or removed"
                )
                return
            found.saves, before = found.saves + 1, step


def _check_checkpoint(path: Path, ledger: Ledger, found: Audit, branched: int | None) -> None:
    """`branched`: after which step the run branched off. OSError where the run removes it now."""
    try:
        verify(path)
    except CorruptCheckpoint as error:
        if not path.is_dir():
            raise FileNotFoundError(path) from None
        found.findings.append(str(error))
        return
    step = step_of(path)
    line = ledger.steps.get(step)
    if line is None:
        found.notes.append(f"{path} is not checked: the ledger has no line of step {step}")
        return
    said = {name: int(line.digests[name], 16) for name in ("weights", "optimizer", "buffers")}
    weights = dict(_digests(path / MODEL))
    if (path / STATISTICS).exists():  # the model has those that it was evaluated with
        weights |= dict(_digests(path / STATISTICS))
    if sum(weights.values()) & MASK != (said["weights"] + said["buffers"]) & MASK:
        found.findings.append(
            f"{path / MODEL}: weights or running statistics are not those that the ledger has of "
            f"step {step}"
        )
    scalars = parse_json((path / STATE).read_bytes()).get("optimizer", {})
    found.checkpoints.append(step)
    if step == branched and not scalars and not read_header(path / OPTIMIZER).tensors:
        return  # another optimizer than its parent's, which the line is of, starts without state
    state = sum(value for _, value in _digests(path / OPTIMIZER))
    state += sum(digest_value(name, to_json(value)) for name, value in scalars.items())
    if state & MASK != said["optimizer"]:
        found.findings.append(
            f"{path / OPTIMIZER}: the optimizer's state is not that which the ledger has of step "
            f"{step}"
        )


def _digests(path: Path) -> Iterator[tuple[str, int]]:
    """The digest of each tensor of a safetensors file."""
    tensors = read_header(path).tensors
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = parse_json(file.read(length))
    header.pop(METADATA, None)
    if not any(np.prod(entry.shape) for entry in tensors.values()):
        return
    content = np.memmap(path, np.uint8, "r", 8 + length)
    for name, entry in tensors.items():
        start, end = header[name]["data_offsets"]
        if end > start:
            width = WIDTHS[entry.dtype]
            yield name, digest_bytes(name, content[start:end].data, width, entry.shape)
