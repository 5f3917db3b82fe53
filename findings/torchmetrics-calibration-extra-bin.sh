#!/usr/bin/env bash
# torchmetrics 1.9.0: the calibration error counts a confidence of exactly 1.0 in a bin of its own
# beyond the last one.
#
# With two samples in [0.9, 1] of 10 bins, one at 0.95 and right, one at 1.0 and wrong, the last
# bin has mean confidence 0.975 and accuracy 0.5: an error of 0.475. The metric gives 0.525, the
# mean of 0.05 and 1.0. A softmax in float32 reaches 1.0 at a margin of 17, so confident networks
# have many such samples. Reported upstream as torchmetrics issue 3510.
#
# Seen 2026-11-28: confidence 1.0: 0.525 (right: 0.475); confidence 0.999999: 0.475
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
  python3 -m venv venv
  python=$work/venv/bin/python
  "$python" -m pip install --quiet torchmetrics==1.9.0 torch==2.14.1 numpy==2.4.6
fi

"$python" - <<'PY'
import torch
from torchmetrics.functional.classification import multiclass_calibration_error


def error(confidence):
    rows = torch.tensor([[0.95, 0.05], [confidence, 1 - confidence]])
    return multiclass_calibration_error(rows, torch.tensor([0, 1]), num_classes=2, n_bins=10).item()


one, nearly = error(1.0), error(0.999999)
print(f"confidence 1.0: {one:.3f} (right: 0.475); confidence 0.999999: {nearly:.3f}")
assert abs(one - 0.525) < 1e-4
assert abs(nearly - 0.475) < 1e-4
PY
