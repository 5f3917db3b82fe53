#!/usr/bin/env bash
# pytorch_optimizer 4.1.0: the first step of Lamb is ten times as long as its rate says.
#
# LAMB (arXiv 1904.00962, algorithm 2) takes a step of length lr * |w| in every layer. This one
# divides the rate by 1 - beta1^t besides: at beta1 = 0.9 the first step is 10 times that, the
# second 5.3 times, and by step 30 it is right. A warmup hides it.
#
# Seen 2026-11-28:
#   length of the step over lr * |w|: 10.01 at step 1, 5.25 at step 2, 1.07 at step 30
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
  python3 -m venv venv
  python=$work/venv/bin/python
  "$python" -m pip install --quiet torch==2.14.1 numpy==2.4.6 pytorch_optimizer==4.1.0
fi

"$python" - <<'PY'
import torch
from pytorch_optimizer import Lamb

# One gradient throughout: m / (1 - beta1^t) is the gradient itself at every step.
weight = torch.nn.Parameter(torch.full((4,), 1.0))
optimizer = Lamb([weight], lr=1e-6, betas=(0.9, 0.999), weight_decay=0.0)
ratios = []
for _ in range(30):
    weight.grad = torch.full((4,), 0.5)
    before = weight.detach().clone()
    optimizer.step()
    ratios.append(((weight.detach() - before).norm() / (1e-6 * before.norm())).item())
print("length of the step over lr * |w|: ", end="")
print(", ".join(f"{ratios[t - 1]:.2f} at step {t}" for t in (1, 2, 30)))
for step in (1, 2, 30):
    expected = 1 / (1 - 0.9**step)
    assert abs(ratios[step - 1] / expected - 1) < 0.1, (step, ratios[step - 1], expected)
PY
