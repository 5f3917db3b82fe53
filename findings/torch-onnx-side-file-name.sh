#!/usr/bin/env bash
# torch 2.14: an exported ONNX model keeps its weights in a second file, by the name that it was
# exported under. Renamed, it answers with the weights of the next model of that name.
#
# torch.onnx.export(net, args, "model.onnx") also writes model.onnx.data, whatever the size. After
# `mv model.onnx first.onnx` all is well, since model.onnx.data is still there, until another
# network is exported as model.onnx: first.onnx then reads the weights of that one, without an
# error, and beside them the small tensors of its own that stand in the file itself.
# external_data=False writes one file.
#
# Seen 2026-11-29:
#   files: model.onnx, model.onnx.data
#   renamed: answers as the first network True
#   after another export as model.onnx: answers as the first network False
#   external_data=False: model.onnx; renamed, after another export: as the first network True
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
  python3 -m venv venv
  python=$work/venv/bin/python
  "$python" -m pip install --quiet torch==2.14.1 onnx==1.23.2 onnxscript==0.7.2 \
    onnxruntime==1.32.0 numpy==2.4.6
fi

mkdir two one
"$python" - <<'PY'
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import nn

torch.manual_seed(0)
first, second = (nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)) for _ in range(2))
inputs = torch.ones(2, 64)
expected = first(inputs).detach().numpy()


def export(network, path, **options):
    torch.onnx.export(network.eval(), (inputs,), str(path), dynamo=True, verbose=False, **options)


def as_first(path):
    session = onnxruntime.InferenceSession(str(path))
    (found,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    return bool(np.allclose(found, expected, atol=1e-4))


two = Path("two")
export(first, two / "model.onnx")
print("files:", ", ".join(sorted(p.name for p in two.iterdir())))
(two / "model.onnx").rename(two / "first.onnx")
renamed = as_first(two / "first.onnx")
print("renamed: answers as the first network", renamed)
export(second, two / "model.onnx")
after = as_first(two / "first.onnx")
print("after another export as model.onnx: answers as the first network", after)

one = Path("one")
export(first, one / "model.onnx", external_data=False)
files = ", ".join(sorted(p.name for p in one.iterdir()))
(one / "model.onnx").rename(one / "first.onnx")
export(second, one / "model.onnx", external_data=False)
whole = as_first(one / "first.onnx")
print(f"external_data=False: {files}; renamed, after another export: as the first network {whole}")
assert renamed
assert not after
assert whole
PY
