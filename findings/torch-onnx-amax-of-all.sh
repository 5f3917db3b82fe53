#!/usr/bin/env bash
# torch 2.14: `x.amax()` and `x.amin()` over all of a tensor, as PyTorch allows, cannot be exported
# to ONNX; `x.max()`, which is the same number, can, and so can `x.amax(dim=(0, 1))`.
#
# torch.export takes all of them; the step from its program to ONNX raises ConversionError for the
# two that name no dimension. Seen with onnxscript 0.7.2, the exporter's own.
#
# Seen 2026-11-29:
#   amax(): ConversionError
#   amin(): ConversionError
#   max(): 5.0
#   amax(dim=(0, 1)): 5.0
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
  python3 -m venv venv
  python=$work/venv/bin/python
  "$python" -m pip install --quiet torch==2.14.1 numpy==2.4.6 onnx==1.23.2 onnxscript==0.7.2 \
    onnxruntime==1.32.0
fi

"$python" - 2>/dev/null <<'PY'
import onnxruntime
import torch

x = torch.arange(6.0).reshape(2, 3)
ways = {
    "amax()": lambda x: x.amax(),
    "amin()": lambda x: x.amin(),
    "max()": lambda x: x.max(),
    "amax(dim=(0, 1))": lambda x: x.amax(dim=(0, 1)),
}


class Way(torch.nn.Module):
    def __init__(self, way):
        super().__init__()
        self.way = way

    def forward(self, x):
        return self.way(x)


found = {}
for name, way in ways.items():
    torch.export.export(Way(way), (x,))  # holds for all of them
    try:
        torch.onnx.export(Way(way), (x,), dynamo=True, verbose=False).save("way.onnx")
    except Exception as error:
        found[name] = type(error).__name__
    else:
        session = onnxruntime.InferenceSession("way.onnx")
        (answer,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        found[name] = float(answer)
    print(f"{name}: {found[name]}")
assert found == {
    "amax()": "ConversionError",
    "amin()": "ConversionError",
    "max()": 5.0,
    "amax(dim=(0, 1))": 5.0,
}, found
PY
