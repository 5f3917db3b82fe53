"""A served network as the bytes of one file: ONNX, or a torch.export program."""

import io
from collections.abc import Mapping

import torch
from torch.export import Dim, ExportedProgram

from bigbatch.configs.errors import UserError
from bigbatch.trainers.export.served import INPUT, Served

PROGRAM_EXTRA = "description.json"  # the description, inside a .pt2
_AXES = {0: "N", 1: "H", 2: "W"}  # of the pixels, that are free
# An example of one image makes torch take N for the constant 1; and one whose height and width
# are alike would leave open whether they may differ.
_EXAMPLE = (2, 67, 83)
_PROTOBUF_LIMIT = 2**31 - 1  # bytes of one message, and so of one ONNX file
_ROOM = 64 * 2**20  # of that, for what is no weight


def trace(served: Served) -> ExportedProgram:
    """The program of a network, for any number, height and width of images.

    Puts it into eval mode: in train mode, stochastic depth and dropout would be in the program.
    Raises UserError where a member cannot be traced.
    """
    served.eval()
    example = torch.zeros(*_EXAMPLE, served.channels, dtype=torch.uint8)
    free = {INPUT: {axis: Dim(name) for axis, name in _AXES.items()}}
    try:
        with torch.no_grad():
            return torch.export.export(served, (example,), dynamic_shapes=free)
    except Exception as error:  # whatever a model's own code does that torch cannot trace
        names = ", ".join(member.name for member in served.members)
        raise UserError(
            f"torch cannot trace {names}: {_first_line(error)}; export .safetensors, which "
            "timm loads"
        ) from error


def program_bytes(program: ExportedProgram, description: str) -> bytes:
    """A .pt2 file; `torch.export.load` gives the description back as an extra file."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={PROGRAM_EXTRA: description})
    return buffer.getvalue()


def onnx_bytes(served: Served, program: ExportedProgram, metadata: Mapping[str, str]) -> bytes:
    """An ONNX file that needs no other: weights inside, `metadata` as its metadata_props.

    Raises UserError where onnx is not installed, where the file would be above protobuf's 2 GiB,
    and where the program has an operation that ONNX lacks.
    """
    weights = sum(tensor.nbytes for tensor in served.state_dict().values())
    if weights > _PROTOBUF_LIMIT - _ROOM:
        raise UserError(
            f"{weights:,} bytes of weights in {len(served.members)} members are more than one ONNX "
            "file holds (2 GiB); export .pt2, fewer members (--members), or a soup of them"
        )
    try:
        import onnxscript  # noqa: F401  # torch's exporter needs it, and onnx with it
    except ImportError:
        raise UserError(
            "ONNX needs onnx and onnxscript, which are not installed; "
            "pip install 'bigbatch[export]'"
        ) from None
    axes = {INPUT: _AXES}
    try:
        converted = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=[INPUT],
            output_names=list(served.outputs),
            dynamic_shapes=axes,
        )
    except Exception as error:
        raise UserError(
            f"ONNX cannot hold this model: {_first_line(error)}; export .pt2"
        ) from error
    assert converted is not None
    model = converted.model_proto
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    content: bytes = model.SerializeToString()
    return content


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__
