#!/usr/bin/env bash
# torch 2.14.1, CPU: in channels_last, BatchNorm2d's backward pass adds a channel's gradients up
# in float32, one after another.
#
# The gradient of the bias is the sum of the incoming gradients. With 0.1 everywhere and 64
# images of 56x56 pixels it is off by 0.2 %, with 256 of 112x112 by 3.3 %, and by other amounts
# with two threads; the same tensors in the contiguous format are right to 3e-6. The errors are
# those of a plain float32 running sum (numpy.cumsum), to all their digits.
#
# Seen 2026-11-28, relative error of bias.grad, one thread and two:
#   64x64x56x56:   contiguous 6.8e-07 and 6.8e-07, channels_last 2.0e-03 and 1.6e-04
#   256x2x112x112: contiguous 2.3e-06 and 2.3e-06, channels_last 3.3e-02 and 3.2e-03
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


def error(shape, layout, threads):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm2d(shape[1])
    images = torch.randn(shape).contiguous(memory_format=layout).requires_grad_()
    gradient = torch.full(shape, 0.1).contiguous(memory_format=layout)
    norm(images).backward(gradient)
    right = torch.tensor(0.1).double() * shape[0] * shape[2] * shape[3]
    return ((norm.bias.grad.double() - right) / right).abs().max().item()


for shape in ((64, 64, 56, 56), (256, 2, 112, 112)):
    plain = [error(shape, torch.contiguous_format, threads) for threads in (1, 2)]
    last = [error(shape, torch.channels_last, threads) for threads in (1, 2)]
    print(shape, "contiguous %.1e, %.1e; channels_last %.1e, %.1e" % (*plain, *last))
    assert max(plain) < 1e-5
    assert last[0] > 1e-3
    assert last[0] != last[1], "the number of threads no longer changes the sum"
PY
