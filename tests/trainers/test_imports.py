"""A process imports what its recipe uses: each rank, trial and restart pays for the rest."""

import json
import subprocess
import sys

from tests.helpers.imports import DENIED

# One process for all: torch alone takes longer than all that is ours.
_CODE = """
import gc, importlib, json, sys
gc.disable()
found = {}
for entry, denied in json.loads(sys.argv[1]).items():
    importlib.import_module(entry)
    found[entry] = {name: why for name, why in denied.items() if name in sys.modules}
print(json.dumps(found))
"""


def test_entries_import_nothing_on_their_deny_lists() -> None:
    arguments = [sys.executable, "-c", _CODE, json.dumps(DENIED)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {entry: {} for entry in DENIED}
