"""A process imports what its recipe uses: each rank, trial and restart pays for the rest."""

import json
import subprocess
import sys

from tests.helpers.imports import DENIED

# One process for all: torch alone takes longer than all that is ours.
_CODE = """
import contextlib, gc, importlib, json, os, runpy, sys
gc.disable()
found, lists, sys.argv = {}, sys.argv[1], ["entry", "--help"]
for entry, denied in json.loads(lists).items():
    if entry.endswith(".__main__"):  # as it is started
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(open(os.devnull, "w")):
            runpy.run_module(entry, run_name="__main__")
        denied["wandb"] = "0.4 s, for timm's utilities: what scores and ends logs nothing there"
    else:
        importlib.import_module(entry)
    found[entry] = {name: why for name, why in denied.items() if name in sys.modules}
print(json.dumps(found))
"""


def test_entries_import_nothing_on_their_deny_lists() -> None:
    arguments = [sys.executable, "-c", _CODE, json.dumps(DENIED)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {entry: {} for entry in DENIED}
