#!/usr/bin/env bash
# timm 1.0.31: Monte Carlo dropout as it is usually written drops nothing.
#
# The usual recipe leaves a model in evaluation mode and calls train() on its nn.Dropout modules
# alone. A ResNet with drop_rate has no such module: it calls F.dropout with its own mode. An
# attention has one, attn_drop, but the fused kernel takes its rate by the mode of the attention
# around it. So both give the same logits in every pass, without a word: an ensemble of K copies
# of one model. In training mode, normalisation left out, they drop.
#
# Seen 2026-11-29:
#   resnet18, drop_rate: 0 dropout modules; passes differ False, in training mode True
#   vit_tiny_patch16_224, attn_drop_rate: 50 dropout modules; passes differ False, in training
#   mode True
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
import timm
import torch
from torch import nn


@torch.inference_mode()
def differ(model, images):
    return not torch.equal(model(images), model(images))


torch.manual_seed(0)
images = torch.randn(2, 3, 224, 224)
for name, option in (("resnet18", "drop_rate"), ("vit_tiny_patch16_224", "attn_drop_rate")):
    model = timm.create_model(name, num_classes=10, **{option: 0.5}).eval()
    dropouts = [m for m in model.modules() if isinstance(m, nn.Dropout)]
    for module in dropouts:
        module.train()
    usual = differ(model, images)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    training = differ(model, images)
    print(
        f"{name}, {option}: {len(dropouts)} dropout modules; passes differ {usual}, "
        f"in training mode {training}"
    )
    assert not usual
    assert training
PY
