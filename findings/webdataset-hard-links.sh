#!/usr/bin/env bash
# webdataset 1.0.2: images that a tar holds as links are left out without a word, and their
# samples arrive without an image.
#
# GNU tar, as does Python's tarfile, stores the second of two files with one inode as a link to
# the first, so a folder that was deduplicated with hard links loses a member for each copy;
# symbolic links likewise. The reader takes regular members only. The sample is still there, with
# its label alone, so that nothing counts one fewer.
#
# Seen 2026-11-28:
#   a: cls jpg
#   b: cls
#   c: cls
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
  python3 -m venv venv
  python=$work/venv/bin/python
  "$python" -m pip install --quiet webdataset==1.0.2 numpy==2.4.6
fi

"$python" - <<'PY'
import os
import tarfile

import webdataset

os.mkdir("photos")
for key in "abc":
    with open(f"photos/{key}.cls", "w") as file:
        file.write("0")
with open("photos/a.jpg", "wb") as file:
    file.write(b"the bytes of a photo")
os.link("photos/a.jpg", "photos/b.jpg")
os.symlink("a.jpg", "photos/c.jpg")
with tarfile.open("shard.tar", "w") as tar:
    for name in sorted(os.listdir("photos")):
        tar.add(f"photos/{name}", name)
with tarfile.open("shard.tar") as tar:  # the archive is whole: each photo can be read from it
    for key in "abc":
        assert tar.extractfile(f"{key}.jpg").read() == b"the bytes of a photo"
seen = {}
for sample in webdataset.WebDataset("shard.tar", shardshuffle=False):
    seen[sample["__key__"]] = sorted(part for part in sample if not part.startswith("__"))
for key, parts in seen.items():
    print(f"{key}:", *parts)
assert seen == {"a": ["cls", "jpg"], "b": ["cls"], "c": ["cls"]}
PY
