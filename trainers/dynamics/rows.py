"""The rows of samples.f16: three numbers for each place in a run's stream of samples. No torch.

Row n is of position n: the sample that `order.samples` gives for n, as step and place in the step
follow from n too. So no key is stored, a resume cuts the file off where its checkpoint's step ends,
and the same visits are the same bytes. A row is three little-endian float16:

    loss      the sample's term of the recipe's loss
    margin    the logit of its label less the largest other one
    p(true)   the softmax's probability of its label

A row of zeros says that nothing was recorded, as a hole in the file does: a real margin of 0 has a
p(true) above 0. The sign of p(true), which has none, marks a step that made no update.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from bigbatch.configs.rundir import ROW_BYTES

NAMES = ("loss", "margin", "p_true")
assert 2 * len(NAMES) == ROW_BYTES
LARGEST = 65504.0  # of float16; what lies beyond it counts as this
_SIGN = np.uint16(0x8000)
_NAN = np.uint16(0x7E00)  # one of many: which one a device makes must not show

Rows = npt.NDArray[np.float16]  # [n, 3]


def to_bytes(packed: npt.NDArray[np.float64], *, updated: bool) -> bytes:
    """Rows of a step as the file has them, from `pack`'s numbers [n], summed over ranks."""
    words = packed.astype(np.uint64)[:, None] >> np.arange(0, 48, 16, dtype=np.uint64)
    bits = (words & np.uint64(0xFFFF)).astype("<u2")
    bits[np.isnan(bits.view("<f2"))] = _NAN
    if not updated:
        bits[bits.any(1), 2] |= _SIGN
    return bits.tobytes()


def read_rows(path: Path) -> Rows:
    """All whole rows of a file [n, 3], mapped into memory. Raises OSError."""
    count = path.stat().st_size // ROW_BYTES
    if count == 0:
        return np.zeros((0, len(NAMES)), "<f2")
    return np.memmap(path, "<f2", "r", shape=(count, len(NAMES)))
