#!/usr/bin/env bash
# Pillow 13.0.0: Image.open reports the format "MPO", and Image.open(formats=["MPO"]) raises
# KeyError.
#
# A picture with several views, as many cameras and phones write them, opens as MPO; the opener is
# JPEG's, which changes its mind about the format afterwards. A list of allowed formats that was
# made from the formats seen in a data set therefore fails on it, with an error that
# is no UnidentifiedImageError; formats=["JPEG"] opens it.
#
# Seen 2026-11-28: as found: MPO; formats=["MPO"]: KeyError 'MPO'; formats=["JPEG"]: MPO
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
  python3 -m venv venv
  python=$work/venv/bin/python
  "$python" -m pip install --quiet pillow==13.0.0
fi

"$python" - <<'PY'
import io

from PIL import Image

views = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
file = io.BytesIO()
views[0].save(file, "MPO", save_all=True, append_images=views[1:])


def opened(formats=None):
    file.seek(0)
    with Image.open(file, formats=formats) as image:
        return image.format


assert "MPO" in Image.registered_extensions().values()
try:
    opened(["MPO"])
except KeyError as error:
    refused = f"KeyError {error}"
else:
    raise AssertionError("formats=['MPO'] opens it")
print(f'as found: {opened()}; formats=["MPO"]: {refused}; formats=["JPEG"]: {opened(["JPEG"])}')
assert opened() == opened(["JPEG"]) == "MPO"
assert refused == "KeyError 'MPO'"
PY
