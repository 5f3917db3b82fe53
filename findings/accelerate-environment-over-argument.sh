#!/usr/bin/env bash
# accelerate 1.15.0: ACCELERATE_GRADIENT_ACCUMULATION_STEPS in the environment overrules the
# gradient_accumulation_steps that the code passes.
#
# The docstring names the variable as the value "if not passed". It wins over the argument too,
# without a word, and backward() divides every gradient by its number. `accelerate launch
# --gradient_accumulation_steps 4` sets it, so a script that asks for 2 steps trains with
# gradients of half their size.
#
# Seen 2026-11-28, a gradient that is 1 before accelerate divides it:
#   argument 2, no variable: 2 steps, gradient 0.5
#   argument 2, variable 4:  4 steps, gradient 0.25
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
  python3 -m venv venv
  python=$work/venv/bin/python
  "$python" -m pip install --quiet accelerate==1.15.0 torch==2.14.1 numpy==2.4.6
fi

cat >case.py <<'PY'
import sys

import torch
from accelerate import Accelerator

accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
model = accelerator.prepare(torch.nn.Linear(1, 1))
accelerator.backward(model(torch.ones(1, 1)).sum())
steps, gradient = accelerator.gradient_accumulation_steps, model.weight.grad.item()
print(f"argument 2, variable {sys.argv[1]}: {steps} steps, gradient {gradient}")
assert (steps, gradient) == (int(sys.argv[2]), 1 / int(sys.argv[2]))
PY
env -u ACCELERATE_GRADIENT_ACCUMULATION_STEPS "$python" case.py none 2
ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4 "$python" case.py 4 4
