"""The code of a run, kept with it: editing the repository does not change a queued job."""

import hashlib
import shutil
from importlib.util import find_spec
from pathlib import Path

FOLDER = "code"
_PACKAGES = ("configs", "data", "launcher", "slurm", "trainers")
_KEPT = (".py", ".yaml", ".html", ".sbatch")


def freeze_code(run: Path) -> str:
    """Copy the packages in use to RUN/code/bigbatch; returns the SHA-256 of what was copied.

    With RUN/code first in PYTHONPATH this copy is what `import bigbatch` finds, before an
    installed package and before the repository of an editable one.
    """
    target = run / FOLDER / "bigbatch"
    target.mkdir(parents=True)
    (target / "__init__.py").touch()
    for name in _PACKAGES:
        shutil.copytree(package_folder(name), target / name, ignore=_ignore)
    return code_hash(target)


def package_folder(name: str) -> Path:
    """Where `bigbatch.NAME` is, found without importing it."""
    spec = find_spec(f"bigbatch.{name}")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations))).resolve()


def code_hash(folder: Path) -> str:
    """16 hex digits over the names and the bytes of all files that were copied."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in _KEPT):
        content = path.read_bytes()
        name = path.relative_to(folder).as_posix()
        digest.update(f"{len(name)} {name} {len(content)} ".encode() + content)
    return digest.hexdigest()[:16]


def _ignore(folder: str, names: list[str]) -> set[str]:
    return {n for n in names if not (Path(folder, n).is_dir() or n.endswith(_KEPT))} | {
        "__pycache__"
    }
