#!/usr/bin/env bash
# torch 2.14.1: an optimizer's state_dict that is loaded back is not the one that was saved:
# float32 state of a bfloat16 weight comes back as bfloat16.
#
# load_state_dict casts every floating-point tensor to the weight's dtype; only "step" is spared.
# An optimizer that keeps its momentum in float32 beside bfloat16 weights, as it must, resumes
# with three digits of it, without a warning, even if nothing but load_state_dict happened.
#
# Seen 2026-11-28: saved torch.float32 0.33333334, loaded torch.bfloat16 0.33398438
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

weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))


class InFloat32(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self):
        for weight in self.param_groups[0]["params"]:
            state = self.state[weight]
            momentum = state.setdefault("momentum", torch.zeros(weight.shape))
            momentum.add_(weight.grad.float() / 3)
            weight.sub_(momentum.to(weight.dtype), alpha=0.1)


weight.grad = torch.ones_like(weight)
one, other = InFloat32([weight]), InFloat32([weight])
one.step()
other.load_state_dict(one.state_dict())
saved, loaded = one.state[weight]["momentum"][0], other.state[weight]["momentum"][0]
print(f"saved {saved.dtype} {saved.item():.8f}, loaded {loaded.dtype} {loaded.item():.8f}")
assert saved.dtype == torch.float32
assert loaded.dtype == torch.bfloat16
assert loaded.item() == 0.333984375
PY
