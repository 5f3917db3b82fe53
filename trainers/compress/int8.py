"""Post-training quantisation to 8 bits, of an ONNX network: by onnxruntime, in QDQ form."""

import io
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy.typing as npt

from bigbatch.trainers.compress.onnx_parts import IMAGES

CALIBRATIONS = ("minmax", "entropy", "percentile")
Pixels = npt.NDArray[Any]


def quantise(network: bytes, images: Sequence[Pixels], calibration: str = "minmax") -> bytes:
    """An ONNX network in uint8 activations and int8 weights, one scale for each output channel.

    `images` are inputs float32 [B, C, H, W], by which the ranges of activations are found:
    their extremes, or what loses the least information (entropy), or 99.999 % of them
    (percentile). Activations are uint8 since onnxruntime, on x86, has kernels for those alone
    of its convolutions: of int8 ones it leaves half in float32 (Jacob et al. 2018,
    arXiv:1712.05877, is the scheme). The outputs stay float32. Raises ValueError for another
    `calibration`.
    """
    from onnxruntime.quantization import (
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    if calibration not in CALIBRATIONS:
        raise ValueError(f"calibration {calibration!r} is none of {', '.join(CALIBRATIONS)}")
    methods = {
        "minmax": CalibrationMethod.MinMax,
        "entropy": CalibrationMethod.Entropy,
        "percentile": CalibrationMethod.Percentile,
    }
    with tempfile.TemporaryDirectory(prefix="bigbatch-int8-") as folder:
        given, folded, done = (os.path.join(folder, f"{n}.onnx") for n in ("a", "b", "c"))
        Path(given).write_bytes(network)
        # BatchNorm goes into the convolutions first: between them, it would keep them apart.
        quant_pre_process(given, folded, skip_symbolic_shape=True)
        with redirect_stdout(io.StringIO()):  # calibrators tell of their progress there
            quantize_static(
                folded,
                done,
                _Reader(images),
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                per_channel=True,
                calibrate_method=methods[calibration],
                # Logits in 256 steps would be ten times as far off, for nothing.
                extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm"]},
            )
        return Path(done).read_bytes()


class _Reader:
    """onnxruntime's CalibrationDataReader: one batch after another, then None."""

    def __init__(self, images: Sequence[Pixels]) -> None:
        self._images: Iterator[Pixels] = iter(images)

    def get_next(self) -> dict[str, Pixels] | None:
        images = next(self._images, None)
        return None if images is None else {IMAGES: images}
