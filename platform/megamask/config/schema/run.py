"""Name, folder and seed of a run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megamask.config.rules.folders import folder_problems
from megamask.config.rules.problem import Problem
from megamask.config.schema.field import identity, operational
from megamask.config.schema.section import Section

if TYPE_CHECKING:
    from megamask.config.schema.roots import TrainConfig


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

    def problems(self, config: TrainConfig) -> Iterator[Problem]:
        """A place that a run cannot be written to."""
        del config
        yield from folder_problems(
            "run.output_dir",
            self.output_dir,
            needs="appends for the journal and no exclusive links for claims and commits",
            instead="copy committed checkpoints to a store, COMMIT.json last",
        )
