"""Build the wheel, install it into a fresh environment, and import every module of it.

It must carry each package's py.typed as well: without it, a type checker passes over the hints.

The import name is mapped onto top-level folders, so an editable install can hide a module
that the wheel lacks. The fresh environment sees this one's dependencies through a .pth
file, which saves installing gigabytes again, but not this checkout.
"""

import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("configs", "data", "launcher", "slurm", "trainers")

IMPORT_ALL = """
import importlib, sys
for name in sys.argv[1:]:
    module = importlib.import_module(name)
    assert "site-packages" in (module.__file__ or ""), f"{name} came from {module.__file__}"
print(f"{len(sys.argv) - 1} modules imported from the wheel")
"""


def modules() -> list[str]:
    """Every module of the checkout under its import name."""
    names = []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            names.append(".".join(("bigbatch", *parts)).removesuffix(".__init__"))
    return names


def run(*command: str | Path, cwd: Path) -> None:
    subprocess.run([str(c) for c in command], cwd=cwd, check=True)


def check_typed(wheel: Path) -> None:
    """Exit where a package lacks py.typed (PEP 561; `bigbatch` itself has no folder for one)."""
    names = set(zipfile.ZipFile(wheel).namelist())
    missing = [name for f in FOLDERS if (name := f"bigbatch/{f}/py.typed") not in names]
    if missing:
        sys.exit(f"the wheel lacks {', '.join(missing)}: see package-data in pyproject.toml")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        shutil.rmtree(ROOT / "build", ignore_errors=True)  # setuptools would take old modules along
        pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
        run(*pip, "wheel", "--no-deps", "--wheel-dir", scratch, ROOT, cwd=scratch)
        (wheel,) = scratch.glob("*.whl")
        check_typed(wheel)
        venv.create(scratch / "env", with_pip=False)
        python = scratch / "env/bin/python"
        (site,) = (scratch / "env/lib").glob("python*/site-packages")
        run(*pip, "install", "--no-deps", "--target", site, wheel, cwd=scratch)
        # After the wheel on the path, so the wheel's modules win; and without this
        # environment's own editable install, which is a .pth file that addsitedir would run.
        (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        run(python, "-c", IMPORT_ALL, *modules(), cwd=scratch)
        # Files beside the modules: the recipes and the batch script.
        command_line = (python, "-m", "bigbatch.launcher.cli")
        run(*command_line, "recipes", cwd=scratch)
        run(*command_line, "shard", "digits", "shards/digits", cwd=scratch)
        submit = ("submit", "digits", "--nodes", "2", "--gpus-per-node", "1", "--dry-run")
        run(*command_line, *submit, cwd=scratch)


if __name__ == "__main__":
    main()
