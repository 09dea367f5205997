"""What a run trains on, and in which order."""

from __future__ import annotations

from dataclasses import dataclass

from megamask.config.schema.field import extendable, identity


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The prepared corpora of a run and the keys of their order."""

    corpora: dict[str, str] = extendable(
        "name -> folder of a prepared corpus; name and corpus id are identity, the folder is operational"
    )
    seed: int = identity("seed of the order of rows", default=1, minimum=0, maximum=2**64 - 1)
    shuffle_window_blocks: int = identity(
        "rows are shuffled inside windows of this many blocks of the shuffled block order",
        default=64,
        minimum=1,
        unit="blocks",
    )
