#!/usr/bin/env bash
# timm 1.0.31: weights of one's own with 10 classes lose their head when they are loaded into a
# network of 10 classes.
#
# create_model(..., num_classes=10, pretrained_cfg_overlay={"file": ...}) compares 10 with the
# 1,000 classes of the registry's own weights, not with the file, and drops a classifier that
# fits. The backbone arrives, the head stays random; the one word of it is an INFO line. With
# "num_classes": 10 in the overlay all of it loads.
#
# Seen 2026-11-28:
#   file alone: backbone as saved True, head as saved False
#   file and num_classes: backbone as saved True, head as saved True
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
  python3 -m venv venv
  python=$work/venv/bin/python
  "$python" -m pip install --quiet torch==2.14.1 torchvision==0.29.1 timm==1.0.31 \
    numpy==2.4.6 safetensors==0.8.0
fi

"$python" - <<'PY'
import timm
import torch
from safetensors.torch import save_file

saved = timm.create_model("resnet18", num_classes=10)
save_file(saved.state_dict(), "own.safetensors")
cases = {"file alone": ({}, False), "file and num_classes": ({"num_classes": 10}, True)}
for label, (more, kept) in cases.items():
    overlay = {"file": "own.safetensors", **more}
    model = timm.create_model(
        "resnet18", pretrained=True, num_classes=10, pretrained_cfg_overlay=overlay
    )
    backbone = torch.equal(model.conv1.weight, saved.conv1.weight)
    head = torch.equal(model.fc.weight, saved.fc.weight)
    print(f"{label}: backbone as saved {backbone}, head as saved {head}")
    assert backbone
    assert head is kept
PY
