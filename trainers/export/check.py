"""Whether an exported file gives what evaluation gives, image by image, in another process."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import to_json
from bigbatch.configs.size import height_width
from bigbatch.data.batch import Decoding, MicroBatch
from bigbatch.data.geometry import View
from bigbatch.data.index import Index
from bigbatch.data.loader import eval_batches
from bigbatch.trainers.ensemble.combination import Combination
from bigbatch.trainers.ensemble.members import Member
from bigbatch.trainers.evaluation.metrics import Probabilities
from bigbatch.trainers.export import standalone
from bigbatch.trainers.models.build import build_augmenter

TOLERANCE = 1e-4  # of a probability
_NEVER_REDUCED = 1 << 30  # an image size of which no image is a multiple


@dataclass(frozen=True)
class Check:
    """What was found over `images` samples of a split.

    `difference` is the largest one of a probability from what evaluation computes of the same
    pixels, and `key` the sample that has it. Evaluation decodes large JPEGs at a half, a quarter
    or an eighth of their size, which a program that is handed pixels cannot know: `reduced`
    counts those, and `same_labels` the samples whose label evaluation gives as well.
    """

    images: int
    difference: float
    key: str
    reduced: int
    same_labels: int

    @property
    def passed(self) -> bool:
        return self.difference <= TOLERANCE

    def values(self) -> dict[str, Any]:
        return {**asdict(self), "tolerance": TOLERANCE, "passed": self.passed}

    def __str__(self) -> str:
        verdict = "as evaluated" if self.passed else f"NOT as evaluated, {self.key} least"
        text = (
            f"{self.images:,} images: probabilities {verdict} (largest difference "
            f"{self.difference:.1e}), and the label of `evaluate` for {self.same_labels:,}"
        )
        if self.reduced:
            text += f"; {self.reduced:,} of them are decoded there at a reduced size"
        return text


def check_possible(path: Path) -> None:
    """Raise UserError where a file of this kind cannot be run here."""
    if path.suffix == ".safetensors":
        raise UserError(
            f"--check runs a file, and {path} is weights alone; export .onnx or .pt2 to check"
        )
    if path.suffix == ".onnx" and find_spec("onnxruntime") is None:
        raise UserError(
            "--check needs onnxruntime, which is not installed; pip install 'bigbatch[export]'"
        )


def check_file(
    path: Path,
    members: Sequence[Member],
    combination: Combination,
    index: Index,
    images: int,
) -> Check:
    """Run a file over at most `images` samples of a split, evenly spread over its order.

    Raises UserError where the file does not run, or not with what is installed.
    """
    if not len(index):
        raise UserError(f"{index.place} has no images to check {path} with; name others by --data")
    stride = -(-len(index) // images)
    evaluations = [_Evaluation(member) for member in members]
    streams = [_samples(index, members[0], stride, None)]
    streams += [_samples(index, e.member, stride, e.augmenter.eval_view) for e in evaluations]
    keys = index.keys()
    differences, checked = [], []
    reduced = same = 0
    with _running(path) as run:
        for batch, *read in zip(*streams, strict=True):
            found = run(batch.images()[0].numpy()[None])
            outputs = [e.logits(batch) for e in evaluations]
            expected = _combined(combination, outputs, members)
            differences.append(np.abs(np.array(found["probabilities"][0]) - expected).max())
            checked.append(keys[int(batch.samples[0])])
            other = [_is_reduced(own) for own in read]
            if any(other):
                reduced += 1
                for place, own in enumerate(read):
                    outputs[place] = evaluations[place].logits(own)
                expected = _combined(combination, outputs, members)
            same += int(expected.argmax()) == found["label"][0]
    worst = int(np.nan_to_num(differences, nan=np.inf).argmax())
    return Check(len(checked), float(differences[worst]), checked[worst], reduced, same)


def _combined(
    combination: Combination, logits: Sequence[np.ndarray], members: Sequence[Member]
) -> Probabilities:
    """Probabilities [C] of one image, whose logits are one [1, C] a member."""
    for member, own in zip(members, logits, strict=True):
        if not np.isfinite(own).all():
            raise UserError(
                f"member {member.name} gives logits that are not finite; its weights are no good: "
                "leave it out with --members"
            )
    return combination.apply(np.stack(logits))[0]


class _Evaluation:
    """One member as `bigbatch evaluate` runs it on a CPU."""

    def __init__(self, member: Member) -> None:
        self.member, self.network = member, member.build()
        self.augmenter = build_augmenter(member.recipe, len(member.classes), torch.device("cpu"))

    @torch.inference_mode()
    def logits(self, batch: MicroBatch) -> np.ndarray:
        logits: np.ndarray = self.network(self.augmenter.evaluate(batch)).float().numpy()
        return logits


def _samples(index: Index, member: Member, stride: int, view: View | None) -> Iterator[MicroBatch]:
    """Every `stride`-th sample as a batch of its own: as `view` reads it, or whole."""
    data = member.recipe.data
    decoding = Decoding(
        image_size=_NEVER_REDUCED if view is None else max(height_width(view.out)),
        channels=data.channels,
        workers=0,
        threads=1,
        view=view,
    )
    return eval_batches(index, decoding, batch=1, rank=0, world=stride)


def _is_reduced(batch: MicroBatch) -> bool:
    frame = batch.frames[0]
    return bool(
        frame["factor"] > 1
        or (frame["height"], frame["width"]) != (frame["full_height"], frame["full_width"])
    )


@contextmanager
def _running(path: Path) -> Iterator[Callable[[np.ndarray], dict[str, Any]]]:
    """What the file gives for pixels [1, H, W, C], in a process that hides this product from it."""
    command = [sys.executable, "-I", standalone.__file__, str(path.absolute())]
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile() as said,  # a pipe that nobody reads would fill up
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=said) as process,
    ):

        def run(pixels: np.ndarray) -> dict[str, Any]:
            line = _ask(process, pixels)
            if not line:
                status = process.wait()
                said.seek(0)
                raise _failure(path, status, said.read().decode(errors="replace"))
            found: dict[str, Any] = json.loads(line)
            return found

        try:
            yield run
        finally:
            process.kill()
            process.communicate()


def _ask(process: "subprocess.Popen[bytes]", pixels: np.ndarray) -> bytes:
    """The answer, a line; empty where the process has ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(to_json(list(pixels.shape)).encode() + b"\n" + pixels.tobytes())
        process.stdin.flush()
        return process.stdout.readline()
    except BrokenPipeError:
        return b""


def _failure(path: Path, status: int, said: str) -> UserError:
    reason = said.strip().rpartition("\n")[2] or f"status {status}"
    if status == standalone.MISSING:
        return UserError(f"{path} cannot be run here: {reason}; pip install 'bigbatch[export]'")
    return UserError(f"{path} does not run: {reason}; export it again")
