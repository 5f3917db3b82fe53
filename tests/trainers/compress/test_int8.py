"""Quantisation: which operations onnxruntime makes of it, and how far off it is."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from bigbatch.trainers.compress.int8 import CALIBRATIONS, quantise
from bigbatch.trainers.compress.onnx_parts import LOGITS, network_part, open_session, operations
from tests.trainers.compress.networks import batch, network


@pytest.fixture(scope="module")
def plain() -> bytes:
    return network_part(network(channels=3), 3, 32)


def logits(model: bytes, images: np.ndarray) -> np.ndarray:
    (found,) = open_session(model, 1).run([LOGITS], {"images": images})
    return np.asarray(found)


@pytest.mark.slow
@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_every_convolution_computes_in_integers_and_labels_stay(
    plain: bytes, calibration: str
) -> None:
    seen = [batch(32, 3, seed=s)[0].numpy() for s in range(3)]
    small = quantise(plain, seen, calibration)
    assert operations(plain)["Conv"] == 15
    found = operations(small)
    assert found["QLinearConv"] == 15
    assert not found["Conv"] + found["ConvInteger"] + found["FusedConv"]
    images = batch(64, 3, seed=9)[0].numpy()
    a, b = logits(plain, images), logits(small, images)
    assert (a.argmax(1) == b.argmax(1)).mean() > 0.9
    assert np.abs(a - b).max() < 0.25 * np.ptp(a)
    assert len(np.unique(b)) > 600  # of 640 logits: they are not in 256 steps


@pytest.mark.slow
def test_weights_are_int8_with_a_scale_for_each_channel(plain: bytes) -> None:
    graph = onnx.load_from_string(quantise(plain, [batch(8, 3)[0].numpy()])).graph
    weights = [t for t in graph.initializer if t.data_type == TensorProto.INT8 and len(t.dims) == 4]
    assert len(weights) == 15
    values = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    for weight in weights:
        scale = values[weight.name.removesuffix("_quantized") + "_scale"]
        assert scale.shape == (weight.dims[0],)
    assert not any(
        t.data_type == TensorProto.INT8 and t.name.endswith("relu") for t in graph.initializer
    )
    zero_points = {n.input[2] for n in graph.node if n.op_type == "QuantizeLinear"}
    assert {values[name].dtype for name in zero_points} == {np.dtype(np.uint8)}


def test_another_calibration_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="calibration 'best' is none of minmax, entropy, percent"):
        quantise(b"", [], "best")
