"""Answers for an exported file as a stranger's program would, without this product.

    python -I standalone.py FILE.onnx|FILE.pt2

On standard input, images one after another: a line of JSON, the shape [N, H, W, C], and the
pixels. On standard output a line of JSON for each: all that the file gives, by name. Imports
nothing of this product, and sees to it that neither does what it runs.
"""

import json
import math
import sys
from collections.abc import Callable
from typing import Any

MISSING = 3  # exit status: what runs such files is not installed
Run = Callable[[Any], dict[str, Any]]


def main() -> int:
    path = sys.argv[1]
    is_onnx = path.endswith(".onnx")
    for name in ("bigbatch", "timm", *(["torch"] if is_onnx else [])):
        sys.modules[name] = None  # type: ignore[assignment]  # an import of it raises ImportError
    try:
        import numpy as np

        run = _open_onnx(path) if is_onnx else _open_program(path)
    except ImportError as error:
        print(error, file=sys.stderr)
        return MISSING
    while line := sys.stdin.buffer.readline():
        shape = json.loads(line)
        data = sys.stdin.buffer.read(math.prod(shape))
        found = run(np.frombuffer(data, np.uint8).reshape(shape))
        print(json.dumps(found), flush=True)
    return 0


def _open_onnx(path: str) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(pixels: Any) -> dict[str, Any]:
        found = session.run(None, {session.get_inputs()[0].name: pixels})
        return {name: value.tolist() for name, value in zip(names, found, strict=True)}

    return run


def _open_program(path: str) -> Run:
    import torch

    network = torch.export.load(path).module()
    names = ("probabilities", "label", "rejected")

    def run(pixels: Any) -> dict[str, Any]:
        with torch.no_grad():
            found = network(torch.from_numpy(pixels.copy()))
        return {name: value.tolist() for name, value in zip(names, found, strict=False)}

    return run


if __name__ == "__main__":
    sys.exit(main())
