#!/usr/bin/env bash
# timm 1.0.31 with Pillow 13.0.0: the usual RandAugment of timm's recipes, rand-m9-mstd0.5-inc1,
# ends in a ValueError for about one image in 500.
#
# A magnitude is drawn around 9 and cut at 10. At 10, posterize of the "increasing" kind keeps 0
# bits, and Pillow 13 takes 1 to 8 (ImageOps.posterize; 12 and older made a black image). A worker
# process that meets it ends the epoch.
#
# Seen 2026-11-29: 6 of 3000 images, the first at seed 22: bits must be between or equal to 1 and 8
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
  python3 -m venv venv
  python=$work/venv/bin/python
  "$python" -m pip install --quiet timm==1.0.31 torch==2.14.1 torchvision==0.29.1 \
    pillow==13.0.0 numpy==2.4.6
fi

"$python" - <<'PY'
import random

import numpy as np
import PIL
import timm
from PIL import Image
from timm.data.auto_augment import rand_augment_transform

pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
image = Image.fromarray(pixels)
augment = rand_augment_transform("rand-m9-mstd0.5-inc1", {})
failed = []
for seed in range(3000):
    random.seed(seed)
    np.random.seed(seed)
    try:
        augment(image)
    except ValueError as error:
        failed.append((seed, str(error)))
first, message = failed[0]
print(f"timm {timm.__version__}, Pillow {PIL.__version__}:")
print(f"{len(failed)} of 3000 images, the first at seed {first}: {message}")
assert (len(failed), first) == (6, 22)
assert message == "bits must be between or equal to 1 and 8"
PY
