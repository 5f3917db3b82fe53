"""One network as an ONNX file in three parts, of which only the middle one is to be quantised."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim

from bigbatch.configs.errors import UserError
from bigbatch.configs.size import Size, height_width
from bigbatch.data.batch import Decoding
from bigbatch.data.index import Index
from bigbatch.data.loader import eval_batches
from bigbatch.trainers.ensemble.combination import Combination
from bigbatch.trainers.ensemble.members import Member
from bigbatch.trainers.evaluation import outcomes
from bigbatch.trainers.evaluation.evaluate import labels_of
from bigbatch.trainers.evaluation.outcomes import Outcomes, outcomes_of_rows, row_chunks
from bigbatch.trainers.export.combine import Combine
from bigbatch.trainers.export.preprocess import CentreCrop
from bigbatch.trainers.export.served import INPUT

IMAGES, LOGITS = "images", "logits"
OUTPUTS = ("probabilities", "label")
_NEVER_REDUCED = 1 << 30  # an image size of which no image is a multiple


def network_part(network: nn.Module, channels: int, image_size: Size) -> bytes:
    """The network alone: images float32 [N, C, *image_size] -> logits [N, classes].

    Raises UserError where torch cannot trace it, or ONNX has not all of its operations.
    """
    example = torch.zeros(2, channels, *height_width(image_size))
    return _part(network, example, {IMAGES: {0: "N"}}, [LOGITS])


def other_parts(member: Member) -> tuple[bytes, bytes]:
    """What stands before and after a member's network: pixels to images, logits to outputs."""
    before = _Before(member)
    pixels = torch.zeros(2, 67, 83, before.channels, dtype=torch.uint8)
    first = _part(before, pixels, {INPUT: {0: "N", 1: "H", 2: "W"}}, [IMAGES])
    logits = torch.zeros(2, len(member.classes))
    return first, _part(_After(), logits, {LOGITS: {0: "N"}}, list(OUTPUTS))


def join(before: bytes, network: bytes, after: bytes, metadata: Mapping[str, str]) -> bytes:
    """One file of `other_parts` and `network_part`, the latter as it is or quantised.

    Pixels uint8 [N, H, W, C] of any size -> probabilities float32 [N, classes], label int64 [N],
    as `bigbatch export` writes a member.
    """
    import onnx
    from onnx import compose

    # Each part numbers its values on its own.
    parts = [
        compose.add_prefix(
            onnx.load_from_string(part), f"{name}/", rename_inputs=False, rename_outputs=False
        )
        for name, part in (("before", before), ("network", network), ("after", after))
    ]
    for part in parts:
        part.ir_version = max(p.ir_version for p in parts)
    model = compose.merge_models(parts[0], parts[1], [(IMAGES, IMAGES)])
    model = compose.merge_models(model, parts[2], [(LOGITS, LOGITS)])
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    content: bytes = model.SerializeToString()
    return content


class _Before(nn.Module):
    """Pixels to what the network sees."""

    mean: Tensor
    std: Tensor

    def __init__(self, member: Member) -> None:
        super().__init__()
        recipe = member.recipe
        self.channels = recipe.data.channels
        self.crop = CentreCrop(
            recipe.eval_size, recipe.evaluate.crop_fraction, recipe.evaluate.squash
        )
        self.register_buffer("mean", torch.tensor(recipe.augment.pixel_mean)[:, None, None])
        self.register_buffer("std", torch.tensor(recipe.augment.pixel_std)[:, None, None])

    def forward(self, pixels: Tensor) -> Tensor:
        images: Tensor = self.crop(pixels)
        return images.sub(self.mean).div(self.std)


class _After(nn.Module):
    """Logits to what the file gives."""

    def __init__(self) -> None:
        super().__init__()
        self.combine = Combine(Combination(), 1)

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        probabilities = self.combine(logits[None])
        return probabilities, probabilities.argmax(1)


def _part(
    module: nn.Module, example: Tensor, axes: dict[str, dict[int, str]], outputs: list[str]
) -> bytes:
    (free,) = axes.values()
    dims = ({axis: Dim(name) for axis, name in free.items()},)
    try:
        with torch.no_grad():
            program = torch.export.export(module.eval(), (example,), dynamic_shapes=dims)
        converted = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=list(axes),
            output_names=outputs,
            dynamic_shapes=axes,
        )
    except Exception as error:  # whatever a model's own code does that cannot be traced
        why = str(error).strip().partition("\n")[0]
        raise UserError(f"ONNX cannot hold this network ({why:.200}); leave out int8") from error
    assert converted is not None
    content: bytes = converted.model_proto.SerializeToString()
    return content


def open_session(model: bytes, threads: int, optimised: Path | None = None) -> Any:
    """onnxruntime's session on the CPU; `optimised` is where its own form of the graph goes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # no warning that a graph so optimised is for this machine
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def operations(model: bytes) -> Counter[str]:
    """How many operations of each type onnxruntime makes of a model on this machine."""
    import onnx

    with TemporaryDirectory(prefix="bigbatch-onnx-") as folder:
        path = Path(folder) / "optimised.onnx"
        open_session(model, 1, path)
        return Counter(node.op_type for node in onnx.load(path).graph.node)


def outcomes_by(session: Any, member: Member, index: Index) -> Outcomes:
    """What a file, which is handed whole images, says of a split."""
    data, batch = member.recipe.data, member.recipe.evaluate.batch
    decoding = Decoding(_NEVER_REDUCED, data.channels, workers=0, threads=data.threads)
    parts = []
    for micro_batch in eval_batches(index, decoding, batch=batch, rank=0, world=1):
        images = micro_batch.images()
        labels = labels_of(index, micro_batch.samples)
        found = np.empty((len(images), len(member.classes)))
        for shape in dict.fromkeys(image.shape for image in images):
            places = [i for i, image in enumerate(images) if image.shape == shape]
            pixels = torch.stack([images[i] for i in places]).numpy()
            found[places] = session.run(["probabilities"], {INPUT: pixels})[0]
        parts += [outcomes_of_rows(found[rows], labels[rows]) for rows in row_chunks(*found.shape)]
    return outcomes.join(parts)
