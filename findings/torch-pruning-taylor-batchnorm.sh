#!/usr/bin/env bash
# Torch-Pruning 1.6.1: GroupTaylorImportance never looks at BatchNorm, though it is among the
# layers that it says it scores.
#
# `target_types` holds _BatchNorm, and the branch for it is there; it asks whether the layer is
# pruned by prune_groupnorm_out_channels, which GroupNorm is and BatchNorm is not. So a channel
# whose scale alone matters to the loss has the score 0, without a word. GroupMagnitudeImportance
# asks for prune_batchnorm_out_channels and looks at the scale.
#
# Seen 2026-11-29:
#   magnitude: scores [0.0, 1.0, 2.0, 3.0] for BatchNorm scales [0.0, 1.0, 2.0, 3.0] alone
#   Taylor: scores [0.0, 0.0, 0.0, 0.0] for BatchNorm's |w dL/dw| [0.0, 1.0, 2.0, 3.0] alone
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
  python3 -m venv venv
  python=$work/venv/bin/python
  "$python" -m pip install --quiet torch==2.14.1 torch-pruning==1.6.1 numpy==2.4.6
fi

"$python" - <<'PY'
import torch
import torch_pruning as tp
from torch import nn

conv, norm = nn.Conv2d(1, 4, 1, bias=False), nn.BatchNorm2d(4)
model = nn.Sequential(conv, norm, nn.Conv2d(4, 2, 1, bias=False)).eval()
graph = tp.DependencyGraph().build_dependency(model, example_inputs=torch.zeros(1, 1, 2, 2))
group = graph.get_pruning_group(conv, tp.prune_conv_out_channels, idxs=[0, 1, 2, 3])
for parameter in model.parameters():  # whatever is scored, only BatchNorm's scale has a score
    parameter.data.zero_()
    parameter.grad = torch.ones_like(parameter)
norm.weight.data = torch.arange(4.0)

magnitude = tp.importance.GroupMagnitudeImportance(p=1, group_reduction="sum", normalizer=None)
taylor = tp.importance.GroupTaylorImportance(group_reduction="sum", normalizer=None)
found = magnitude(group).tolist()
print(f"magnitude: scores {found} for BatchNorm scales {norm.weight.tolist()} alone")
assert found == [0, 1, 2, 3]
found = taylor(group).tolist()
expected = (norm.weight * norm.weight.grad).abs().tolist()
print(f"Taylor: scores {found} for BatchNorm's |w dL/dw| {expected} alone")
assert found == [0, 0, 0, 0]
PY
