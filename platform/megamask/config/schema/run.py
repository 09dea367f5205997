"""Name, folder and seed of a run."""

from __future__ import annotations

from dataclasses import dataclass

from megamask.config.schema.field import identity, operational
from megamask.config.schema.section import Section


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """Name, place and seed of a run; the run directory is <output_dir>/<name>."""

    name: str = operational(
        "name of the run and of its folder",
        pattern=r"(?!\.{1,2}$)[A-Za-z0-9._-]{1,100}",
        pattern_words="1 to 100 of letters, digits, '.', '_' and '-', but not '.' or '..'",
    )
    output_dir: str = operational("folder that holds run directories", default="runs", is_path=True)
    seed: int = identity("seed of initial weights, masks and noise levels", default=1, minimum=0, maximum=2**64 - 1)
