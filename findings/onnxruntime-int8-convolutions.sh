#!/usr/bin/env bash
# onnxruntime 1.32.0, CPU provider on x86-64: with int8 activations, half of a
# residual network's quantised convolutions run in float32.
#
# quantize_static puts QuantizeLinear and DequantizeLinear around every convolution of a residual
# network. With uint8 activations the runtime joins all nine of them into QLinearConv. With int8
# activations it joins four; the others run in float32 between two conversions, without a word.
# The model is as small, and slower: 11 of resnet18's 20 convolutions stay in float32.
#
# Seen 2026-11-28:
#   QInt8:  9 convolutions, 4 in int8, 5 in float32
#   QUInt8: 9 convolutions, 9 in int8, 0 in float32
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
  python3 -m venv venv
  python=$work/venv/bin/python
  "$python" -m pip install --quiet onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6
fi

"$python" - <<'PY'
from collections import Counter

import numpy
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

random = numpy.random.default_rng(0)
nodes, weights = [], []


def convolution(source, target, inputs):
    kernel = random.standard_normal((16, inputs, 3, 3)).astype("float32") / (3 * inputs**0.5)
    weights.append(numpy_helper.from_array(kernel, target + "_w"))
    weights.append(numpy_helper.from_array(numpy.zeros(16, "float32"), target + "_b"))
    names = [source, target + "_w", target + "_b"]
    nodes.append(helper.make_node("Conv", names, [target], kernel_shape=[3, 3], pads=[1] * 4))


def node(kind, sources, target):
    nodes.append(helper.make_node(kind, sources, [target]))


convolution("image", "stem", 3)
node("Relu", ["stem"], "block0")
for i in range(4):  # residual blocks: conv, relu, conv, add, relu
    convolution(f"block{i}", f"first{i}", 16)
    node("Relu", [f"first{i}"], f"relu{i}")
    convolution(f"relu{i}", f"second{i}", 16)
    node("Add", [f"block{i}", f"second{i}"], f"sum{i}")
    node("Relu", [f"sum{i}"], f"block{i + 1}")
node("GlobalAveragePool", ["block4"], "features")
image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, 32, 32])
features = helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", 16, 1, 1])
graph = helper.make_graph(nodes, "residual", [image], [features], weights)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
onnx.checker.check_model(model)
onnx.save(model, "float.onnx")


class Images(CalibrationDataReader):
    def __init__(self):
        images = random.standard_normal((4, 2, 3, 32, 32)).astype("float32")
        self.left = iter([{"image": batch} for batch in images])

    def get_next(self):
        return next(self.left, None)


for kind, expected in ((QuantType.QInt8, (4, 5)), (QuantType.QUInt8, (9, 0))):
    quantize_static(
        "float.onnx", "int8.onnx", Images(),
        quant_format=QuantFormat.QDQ, activation_type=kind, weight_type=QuantType.QInt8,
    )
    placed = Counter(n.op_type for n in onnx.load("int8.onnx").graph.node)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = "run.onnx"
    options.log_severity_level = 3
    onnxruntime.InferenceSession("int8.onnx", options, providers=["CPUExecutionProvider"])
    run = Counter(n.op_type for n in onnx.load("run.onnx").graph.node)
    joined, left = run["QLinearConv"], run["Conv"]
    print(f"{kind}: {placed['Conv']} convolutions, {joined} in int8, {left} in float32")
    assert placed["Conv"] == 9
    assert (joined, left) == expected
PY
