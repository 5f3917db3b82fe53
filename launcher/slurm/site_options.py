"""What a site asks of every job: ~/.config/bigbatch/slurm.yaml, as defaults of `submit`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import read_yaml
from bigbatch.configs.part import Count, StrictModel


class Site(StrictModel):
    """Options of `submit` under their own names; the command line comes before them."""

    nodes: str | None = None
    gpus_per_node: Annotated[int, Field(ge=0)] | None = None
    ranks_per_node: Count | None = None
    cpus_per_rank: Count | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    container: str | None = None
    mounts: tuple[str, ...] = ()  # further folders that a container sees
    signal_lead: Count | None = None  # seconds
    sbatch_args: tuple[str, ...] = ()


def site_file(env: Mapping[str, str] = os.environ) -> Path:
    folder = env.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(folder) / "bigbatch" / "slurm.yaml"


def read_site(path: Path) -> Site:
    """The site's defaults; none where there is no file. Raises UserError for what is wrong."""
    if not path.exists():
        return Site()
    tree = read_yaml(path)
    try:
        return Site.model_validate(tree)
    except ValidationError as invalid:
        lines = []
        for error in invalid.errors():
            place = ".".join(map(str, error["loc"]))
            if error["type"] == "extra_forbidden":
                lines.append(f"{place}: unknown key; valid keys: {', '.join(Site.model_fields)}")
            else:
                lines.append(f"{place} = {error['input']!r}: {error['msg']}")
        raise UserError(f"{path}:\n" + "\n".join(f"  {line}" for line in lines)) from None
