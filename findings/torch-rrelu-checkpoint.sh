#!/usr/bin/env bash
# torch 2.14.1: RReLU under activation checkpointing, in the form that torch recommends
# (use_reentrant=False), takes its gradient from slopes that were never written.
#
# RReLU draws a slope for each value and keeps the slopes for the backward pass. They are kept as
# a tensor that is filled only afterwards; the recomputation stops as soon as the last kept tensor
# is there, which is before it is filled. Dropout, which draws as well, is right. Nothing is said:
# gradients are whatever lay in that memory. use_reentrant=True is right.
#
# Seen 2026-11-29: plain 0.1250 to 1.0000; use_reentrant=True the same; use_reentrant=False off by
# 6.6e7 to 1.1e34 in three runs; dropout under the same checkpointing is not off at all
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
from torch.utils.checkpoint import checkpoint

torch.manual_seed(0)
x = torch.randn(64, 1024, requires_grad=True)


def gradient(layer, **how):
    torch.manual_seed(1)
    x.grad = None
    y = checkpoint(layer, x, **how) if how else layer(x)
    held = [torch.full_like(x, 7) for _ in range(8)]  # what lies in memory that is free again
    del held
    y.sum().backward()
    return x.grad.clone()


def worst(layer, **how):
    return (gradient(layer, **how) - gradient(layer)).abs().nan_to_num(float("inf")).max().item()


rrelu, dropout = torch.nn.RReLU(), torch.nn.Dropout(0.5)
plain = gradient(rrelu)
reentrant, recommended = (worst(rrelu, use_reentrant=r) for r in (True, False))
kept = worst(dropout, use_reentrant=False)
print(f"torch {torch.__version__}: plain {plain.min():.4f} to {plain.max():.4f}")
print(f"off by {reentrant} (reentrant), {recommended:.3g} (not), dropout {kept}")
assert reentrant == 0
assert kept == 0
assert recommended > 0.5
PY
