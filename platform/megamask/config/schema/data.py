"""Corpora of a run, and the order of their rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megamask.config.rules.problem import Problem
from megamask.config.schema.field import extendable, identity
from megamask.config.schema.section import Section

if TYPE_CHECKING:
    from megamask.config.schema.roots import TrainConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """The prepared corpora of a run and the keys of their order."""

    corpora: dict[str, str] = extendable(
        "name -> folder of a prepared corpus; name and corpus id are identity, the folder is operational", is_path=True
    )
    seed: int = identity("seed of the order of rows", default=1, minimum=0, maximum=2**64 - 1)
    shuffle_window_blocks: int = identity(
        "rows are shuffled inside windows of this many blocks of the shuffled block order",
        default=64,
        minimum=1,
        unit="blocks",
    )

    score: str = identity(
        "which tokens are noised and scored: all; or, in corpora of conversations, answers alone, the rest being given",
        default="all",
        choices=("all", "answers"),
    )
    isolate_documents: bool = identity(
        "no position sees another document of its row; positions and the block grid restart at each document",
        default=False,
    )

    def problems(self, config: TrainConfig) -> Iterator[Problem]:
        """One corpus, in a folder."""
        del config
        if len(self.corpora) != 1:
            yield Problem(
                key="data.corpora",
                because=f"which has {len(self.corpora)} entries; mixtures are not built yet",
                allowed="exactly one entry, name -> folder (data.corpora.NAME=null takes one away)",
            )
