#!/usr/bin/env bash
# torch 2.14.1: CrossEntropyLoss with class weights and label smoothing has its minimum at the
# wrong class.
#
# The smoothed share of each other class is multiplied by that class's weight, not by the weight
# of the sample's own class. With weights (1, 1, 100) and smoothing 0.1, a sample of class 0 is
# told (0.933, 0.033, 3.333), and the loss is least where class 2 has a probability of 0.775.
# Reported upstream as pytorch issue 104776.
#
# Seen 2026-11-28: probabilities at the minimum for a sample of class 0: 0.217 0.008 0.775
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
  python3 -m venv venv
  python=$work/venv/bin/python
  "$python" -m pip install --quiet torch==2.14.1 numpy==2.4.6
fi

"$python" - <<'PY'
import torch

loss = torch.nn.CrossEntropyLoss(weight=torch.tensor([1.0, 1.0, 100.0]), label_smoothing=0.1)
logits = torch.zeros(1, 3, requires_grad=True)
descent = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")


def value():
    descent.zero_grad()
    out = loss(logits, torch.tensor([0]))
    out.backward()
    return out


descent.step(value)
least = logits.detach().softmax(1)[0]
share = torch.tensor([0.9 + 0.1 / 3, 0.1 / 3, 100 * 0.1 / 3])
print("probabilities at the minimum for a sample of class 0:", *(f"{p:.3f}" for p in least))
assert torch.allclose(least, share / share.sum(), atol=1e-3), least
assert least.argmax() == 2
PY
