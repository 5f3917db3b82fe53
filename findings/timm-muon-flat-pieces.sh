#!/usr/bin/env bash
# timm 1.0.31: Muon steps a matrix by AdamW, in silence, where it gets the matrix flattened, as
# ZeRO and FSDP1 shard parameters.
#
# It chooses by shape: what has one dimension counts as a bias or a scale. A flat piece of a
# weight is no matrix to it, nothing is said, and the run trains with another optimizer.
#
# Seen 2026-11-29:
#   whole: momentum_buffer
#   flat: exp_avg exp_avg_sq step
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
  python3 -m venv venv
  python=$work/venv/bin/python
  "$python" -m pip install --quiet torch==2.14.1 torchvision==0.29.1 timm==1.0.31 numpy==2.4.6
fi

"$python" - <<'PY'
import timm.optim
import torch

weight = torch.randn(16, 64)
expected = {"whole": ["momentum_buffer"], "flat": ["exp_avg", "exp_avg_sq", "step"]}
for label, value in {"whole": weight, "flat": weight.flatten()}.items():
    parameter = torch.nn.Parameter(value.clone())
    parameter.grad = torch.randn_like(parameter)
    optimizer = timm.optim.Muon([parameter], lr=0.02)
    optimizer.step()
    values = optimizer.state[parameter].items()
    state = sorted(key for key, value in values if isinstance(value, torch.Tensor))
    print(f"{label}: {' '.join(state)}")
    assert state == expected[label]
PY
