"""A login node has no torch: launcher/ and configs/ must not need it, not even indirectly."""

import subprocess
import sys

import pytest

IMPORT_ALL = """
import importlib, pkgutil, sys
import bigbatch.configs, bigbatch.launcher

class NoTorch:  # any import of it fails; scipy stumbles over None in sys.modules
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ImportError("no torch here")

sys.meta_path.insert(0, NoTorch())
names = [
    m.name
    for package in (bigbatch.configs, bigbatch.launcher)
    for m in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
    if not m.name.endswith("__main__")
]
for name in names:
    importlib.import_module(name)
print(len(names))
"""


def test_no_module_of_launcher_or_configs_imports_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 40


NO_TORCH = (
    "import sys; sys.modules['torch'] = None; from bigbatch.launcher.cli.main import main; main()"
)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["recipes"],
        ["schema"],
        ["check", "digits"],
        ["schedule", "digits"],
        ["batches", "digits", "--steps", "0:1"],
        ["submit", "digits", "--dry-run", "--no-check"],
        ["runs"],
    ],
    ids=lambda a: a[0],
)
def test_commands_of_a_login_node_run_without_torch(arguments: list[str], shards: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH, *arguments],
        cwd=shards,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
