"""An ensemble as one thing: its members and how they are combined, from runs or a folder.

FOLDER/ensemble.json, FOLDER/members/00.safetensors, FOLDER/members/00.yaml, ...
"""

import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import sync, to_json, write_atomically
from bigbatch.configs.json_text import parse_json
from bigbatch.configs.load import dump_recipe, parse_recipe, read_yaml
from bigbatch.configs.rundir import ENSEMBLE, RunDir
from bigbatch.trainers.ensemble.combination import Combination
from bigbatch.trainers.ensemble.members import Member, check_members, find_members
from bigbatch.trainers.models.weights_file import check_same, read_header, read_info

_FORMAT = 1


@dataclass(frozen=True)
class Ensemble:
    """Members of the same classes and channels, and how their outputs become one."""

    members: tuple[Member, ...]
    combination: Combination

    @property
    def classes(self) -> tuple[str, ...]:
        return self.members[0].classes


def open_ensemble(paths: Sequence[Path], choice: str = "auto") -> Ensemble:
    """What `paths` hold: one folder that `write_ensemble` wrote, or the members of runs.

    Members of runs are combined by the mean of their probabilities. `choice` is that of
    `find_members`, in each run. Raises UserError, which names the member or the file at fault.
    """
    folders = [path for path in paths if (path / ENSEMBLE).is_file()]
    if folders:
        if len(paths) > 1 or choice != "auto":
            raise UserError(
                f"{folders[0]} is an ensemble, whose members are fixed; give it alone and without "
                "--members, or give the runs"
            )
        return _read(folders[0])
    members = [member for path in paths for member in find_members(RunDir(path), choice)]
    check_members(members)
    return Ensemble(tuple(_named_apart(members)), Combination())


def _named_apart(members: Sequence[Member]) -> list[Member]:
    """Members of runs of one name in different folders, each under a name of its own."""
    files: dict[Path, str] = {}  # a link to a run has a name of its own, and no other weights
    for member in members:
        file = member.weights.resolve()
        if file in files:
            names = " and ".join(sorted({member.name, files[file]}))
            raise UserError(f"member {names} is given twice; give each run once")
        files[file] = member.name
    counts = Counter(member.name for member in members)
    seen = Counter[str]()
    named: list[Member] = []
    for member in members:
        if counts[member.name] > 1:
            seen[member.name] += 1
            member = replace(member, name=f"{member.name}#{seen[member.name]}")
        named.append(member)
    return named


def write_ensemble(
    folder: Path, ensemble: Ensemble, record: Mapping[str, Any] | None = None
) -> None:
    """Write an ensemble into a new folder, weights included, all or nothing.

    `record` is kept beside: how it was made, and on which data. Raises UserError where the
    folder exists, and OSError.
    """
    if folder.exists():
        raise UserError(f"{folder} exists already; choose another --out")
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    (temporary / "members").mkdir(parents=True)
    try:
        entries = []
        for number, member in enumerate(ensemble.members):
            stem = f"members/{number:02d}"
            shutil.copyfile(member.weights, temporary / f"{stem}.safetensors")
            sync(temporary / f"{stem}.safetensors")
            write_atomically(temporary / f"{stem}.yaml", dump_recipe(member.recipe))
            entries.append({"name": member.name, "file": stem})
        content = {
            "format": _FORMAT,
            "members": entries,
            "combination": ensemble.combination.to_json(),
            "classes": list(ensemble.classes),
            "record": dict(record or {}),
        }
        write_atomically(temporary / ENSEMBLE, to_json(content, indent=1) + "\n")
        sync(temporary)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(folder.parent)


def read_record(folder: Path) -> dict[str, Any]:
    """How the ensemble of a folder was made. UserError where the folder is damaged."""
    record = _content(folder)["record"]
    if not isinstance(record, dict):
        raise _damaged(folder, "its record is no mapping")
    return record


def _read(folder: Path) -> Ensemble:
    content = _content(folder)
    try:
        combination = Combination.from_json(content["combination"])
    except ValueError as error:
        raise _damaged(folder, str(error)) from None
    classes, entries = content["classes"], content["members"]
    if not (isinstance(classes, list) and isinstance(entries, list) and entries):
        raise _damaged(folder, "it lists no members, or no classes")
    members = []
    for number, entry in enumerate(entries):
        stem = f"members/{number:02d}"
        if not isinstance(entry, dict) or entry.get("file") != stem or "name" not in entry:
            raise _damaged(folder, f"entry {number} of its members is {entry!r:.60}")
        members.append(_member(folder, str(entry["name"]), stem, tuple(map(str, classes))))
    check_members(members)
    wanted = combination.members, combination.classes
    if wanted[0] not in (None, len(members)) or wanted[1] not in (None, len(classes)):
        raise _damaged(folder, "its combination is for other members or classes than it lists")
    return Ensemble(tuple(members), combination)


def _member(folder: Path, name: str, stem: str, classes: tuple[str, ...]) -> Member:
    weights, recipe = folder / f"{stem}.safetensors", folder / f"{stem}.yaml"
    try:
        member = Member(name, weights, parse_recipe(read_yaml(recipe), str(recipe)), classes)
        info = read_info(read_header(weights))
        check_same(weights.name, info, member.info, f"{recipe.name} and {ENSEMBLE} say")
    except (OSError, ValueError) as error:  # UserError as well
        raise UserError(f"member {name} of {folder}: {error}; {_REMEDY}") from None
    return member


_REMEDY = "restore it from a backup, or make it again with `bigbatch ensemble`"


def _content(folder: Path) -> dict[str, Any]:
    path = folder / ENSEMBLE
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise _damaged(folder, str(error)) from None
    wanted = {"format", "members", "combination", "classes", "record"}
    if not isinstance(content, dict) or wanted - content.keys():
        raise _damaged(folder, "it does not hold what an ensemble is made of")
    if content["format"] != _FORMAT:
        raise UserError(
            f"{path} has format {content['format']!r:.20}, this version reads {_FORMAT}; use the "
            "version that wrote it, or make it again with `bigbatch ensemble`"
        )
    return content


def _damaged(folder: Path, why: str) -> UserError:
    return UserError(f"{folder / ENSEMBLE} is damaged: {why}; {_REMEDY}")
