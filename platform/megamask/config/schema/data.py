"""Corpora of a run, and the order of their rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megamask.config.rules.folders import folder_problems
from megamask.config.rules.problem import Problem
from megamask.config.schema.field import extendable, identity, operational
from megamask.config.schema.section import Section

if TYPE_CHECKING:
    from megamask.config.schema.roots import TrainConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """The prepared corpora of a run and the keys of their order."""

    corpora: dict[str, str] = extendable(
        "name -> folder of a prepared corpus, or URL of one in an object store (s3, gs, az, http, https); name and "
        "corpus id are identity, the folder is operational. The likelihood bound during training is of the validation "
        "split of the first one; of the others that have one it is recorded beside it",
        is_path=True,
    )
    seed: int = identity("seed of the order of rows", default=1, minimum=0, maximum=2**64 - 1)
    shuffle_window_blocks: int = identity(
        "rows are shuffled inside windows of this many blocks of the shuffled block order",
        default=64,
        minimum=1,
        unit="blocks",
    )
    read_ahead_batches: int = operational(
        "batches that a thread reads before they are asked for; each takes its tokens in the stored type",
        default=2,
        minimum=0,
        unit="batches",
    )

    mixture: list[dict[str, Any]] = extendable(
        "stages {until_tokens, weights, max_epochs}, in order: the share of each corpus by weight until so many tokens "
        "(padding included) were read, the last stage without an end; empty with one corpus. max_epochs refuses a run "
        "that would repeat a corpus more often. The last stage may be given an end and stages be added behind it",
        default=[],
    )

    cache_dir: str = operational(
        "folder of local copies of corpora in object stores; the processes of a node share it",
        default="~/.cache/megamask",
        is_path=True,
    )
    cache_bytes: int = operational(
        "most bytes of shard blocks in data.cache_dir; those used longest ago are removed",
        default=50_000_000_000,
        minimum=1 << 26,
        unit="bytes",
    )
    quarantine: list[str] = operational(
        "rows of the training split that are not read, as NAME:ROW or NAME:FIRST-LAST; each keeps its place with no "
        "eligible token, and every attempt journals the list",
        default=[],
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
        """Corpora, and a mixture that names them."""
        del config
        if not self.corpora:
            yield Problem(
                key="data.corpora",
                because="which has 0 entries",
                allowed="at least one entry, name -> folder (data.corpora.NAME=null takes one away)",
            )
        if len(self.corpora) > 1 and not self.mixture:
            yield Problem(
                key="data.corpora",
                because=f"which has {len(self.corpora)} entries, and data.mixture has no stage",
                allowed="one entry, or weights of all in data.mixture, as [{weights: {NAME: 1, OTHER: 1}}]",
            )
        yield from folder_problems(
            "data.cache_dir",
            self.cache_dir,
            needs="renames, by which processes share the cache",
            instead="one on the node's own disk",
        )
        yield from _mixture_problems(self.mixture, self.corpora)


def _mixture_problems(mixture: Sequence[Mapping[str, Any]], corpora: Mapping[str, str]) -> Iterator[Problem]:
    before = 0
    for number, stage in enumerate(mixture, start=1):
        end, weights, limits = stage.get("until_tokens"), stage.get("weights", {}), stage.get("max_epochs", {})
        is_last = number == len(mixture)
        if (end is None) != is_last:
            because = "has an end" if is_last else "has no until_tokens"
            yield Problem(
                key="data.mixture",
                because=f"whose stage {number} of {len(mixture)} {because}",
                allowed="until_tokens in every stage but the last",
            )
        elif end is not None and end <= before:
            yield Problem(
                key="data.mixture",
                because=f"whose stage {number} ends at {end}",
                allowed=f"until_tokens above {before}",
            )
        before = end or before
        unknown = sorted({*weights, *limits} - set(corpora))
        if unknown:
            yield Problem(
                key="data.mixture",
                because=f"whose stage {number} names {unknown[0]}",
                allowed=f"names in data.corpora: {', '.join(corpora)}",
            )
        if not weights or not all(weight > 0 for weight in [*weights.values(), *limits.values()]):
            yield Problem(
                key="data.mixture",
                because=f"whose stage {number} has no weights, or a number that is not above 0",
                allowed="weights and max_epochs above 0; leave a source out to read nothing of it",
            )
