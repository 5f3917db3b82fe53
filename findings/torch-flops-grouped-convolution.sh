#!/usr/bin/env bash
# torch 2.14.1: FlopCounterMode counts the backward pass of a grouped convolution as if it
# had one group.
#
# A convolution's backward pass computes the gradient of its input and that of its weights, each
# as many operations as the forward pass. The counter is right with groups=1, and right about
# the forward pass with groups=64; of the backward pass it then counts 65 times the forward pass
# instead of twice. Networks of depthwise convolutions seem to train at a multiple of the
# machine's speed.
#
# Seen 2026-11-28:
#   groups=1:  forward 18,874,368, backward 37,748,736 (2.0 times)
#   groups=64: forward 294,912, backward 19,169,280 (65.0 times)
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
from torch.utils.flop_counter import FlopCounterMode

# Multiply-adds count as two; 64 channels of 16x16 pixels, 3x3 taps, 64 / groups inputs each.
for groups, backward in ((1, 37_748_736), (64, 19_169_280)):
    layer = torch.nn.Conv2d(64, 64, 3, padding=1, groups=groups, bias=False)
    image = torch.randn(1, 64, 16, 16, requires_grad=True)
    with FlopCounterMode(display=False) as there:
        out = layer(image)
    with FlopCounterMode(display=False) as back:
        out.sum().backward()
    fw, bw = there.get_total_flops(), back.get_total_flops()
    print(f"groups={groups}: forward {fw:,}, backward {bw:,} ({bw / fw:.1f} times)")
    assert fw == 2 * 64 * 256 * 9 * 64 // groups, fw
    assert bw == backward, bw
PY
