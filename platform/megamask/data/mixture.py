"""The mixture law: the source of each sample, and the draws from it before, are arithmetic on the stages alone.

A stage begins at a sample index and goes on to the next one's. Counted from its beginning, it is cut into time blocks
of TIME_BLOCK samples. A full block has an exact integer number of samples of each source: its share by weight, rounded
so that the counts since the stage began are never more than a sample or two away from the weights. Inside the block
the sources are ordered by Philox words of the sample index. A block that the end of its stage cuts off is the beginning
of a full one, so giving the last stage an end, or adding stages behind it, moves nothing that came before.

The draws of a source are numbered through all stages; with one source, sample index and draw are the same number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import torch

from megamask.data.lru import LeastRecentlyUsed
from megamask.diffusion.philox import Purpose, philox4x32
from megamask.storage.hashing import hash_of, key_of

TIME_BLOCK = 1 << 14  # samples

Int64Array = npt.NDArray[np.int64]
_LOW_WORD = 0xFFFFFFFF
_CACHED_BLOCKS = 4


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Weights from one sample index on, by source in the order of `data.corpora`; absent sources have none."""

    first_sample: int
    weights: Mapping[str, Fraction]


def stages_of(mixture: Sequence[Mapping[str, object]], sources: Sequence[str], sequence_length: int) -> list[Stage]:
    """The stages of `data.mixture`, or one of equal parts where there are none.

    Args:
        mixture: entries {until_tokens, weights}; a stage ends with the sample that completes `until_tokens`.
        sources: names in `data.corpora`.
        sequence_length: tokens of a sample, padding included.
    """
    if not mixture:
        return [Stage(first_sample=0, weights=dict.fromkeys(sources, Fraction(1)))]
    stages, first = [], 0
    for entry in mixture:
        weights = entry["weights"]
        assert isinstance(weights, Mapping)
        exact = {name: Fraction(str(weights[name])) for name in sources if name in weights}
        stages.append(Stage(first_sample=first, weights=exact))
        until = entry.get("until_tokens")
        if isinstance(until, int):
            first = -(-until // sequence_length)
    return stages


class Mixture:
    """The endless sequence of (source, draw) of a run.

    Args:
        sources: names, in the order of `data.corpora`; appending to them changes nothing.
        stages: of `stages_of`; the first begins at sample 0.
        data_seed: `data.seed`.
    """

    def __init__(self, sources: Sequence[str], stages: Sequence[Stage], data_seed: int) -> None:
        self._sources = list(sources)
        self._stages = [_StageCounts(stage, self._sources) for stage in stages]
        self._key = key_of(hash_of(data_seed, "mixture"))
        self._blocks: LeastRecentlyUsed[tuple[int, int], Int64Array] = LeastRecentlyUsed(_CACHED_BLOCKS)
        self._drawn_before: list[Int64Array] = [np.zeros(len(self._sources), np.int64)]

    def draws(self, first_index: int, count: int) -> tuple[Int64Array, Int64Array]:
        """Sources (numbers) and draws of the sample indices first_index, ..., first_index + count - 1.

        Returns: two int64 arrays [count].
        """
        if len(self._sources) == 1:
            return np.zeros(count, np.int64), np.arange(first_index, first_index + count)
        sources, draws = np.empty(count, np.int64), np.empty(count, np.int64)
        done = 0
        while done < count:
            number, block, offset, room = self._locate(first_index + done)
            size = min(count - done, room)
            order = self._order(number, block)
            base = self._before(number) + self._stages[number].before(block)
            part = order[offset : offset + size]
            sources[done : done + size] = part
            for source in np.unique(part).tolist():
                is_here = part == source
                seen = int((order[:offset] == source).sum())
                draws[done : done + size][is_here] = base[source] + seen + np.arange(int(is_here.sum()))
            done += size
        return sources, draws

    def consumed(self, num_samples: int) -> dict[str, int]:
        """Draws of each source among the first `num_samples` samples."""
        if len(self._sources) == 1:
            return {self._sources[0]: num_samples}
        number = self._stage_of(num_samples)
        counts = self._before(number) + self._within(number, num_samples - self._stages[number].first_sample)
        return dict(zip(self._sources, counts.tolist(), strict=True))

    def _stage_of(self, index: int) -> int:
        begins = [stage.first_sample for stage in self._stages]
        return int(np.searchsorted(begins, index, side="right")) - 1

    def _locate(self, index: int) -> tuple[int, int, int, int]:
        """Stage, block of the stage, place in the block, and samples of the block from there on."""
        number = self._stage_of(index)
        block, offset = divmod(index - self._stages[number].first_sample, TIME_BLOCK)
        room = TIME_BLOCK - offset
        if number + 1 < len(self._stages):
            room = min(room, self._stages[number + 1].first_sample - index)
        return number, block, offset, room

    def _before(self, number: int) -> Int64Array:
        """Draws of each source before a stage."""
        while len(self._drawn_before) <= number:
            last = len(self._drawn_before) - 1
            size = self._stages[last + 1].first_sample - self._stages[last].first_sample
            self._drawn_before.append(self._drawn_before[last] + self._within(last, size))
        return self._drawn_before[number]

    def _within(self, number: int, size: int) -> Int64Array:
        """Draws of each source among the first `size` samples of a stage."""
        block, offset = divmod(size, TIME_BLOCK)
        counts = self._stages[number].before(block)
        if offset:
            counts = counts + np.bincount(self._order(number, block)[:offset], minlength=len(self._sources))
        return counts

    def _order(self, number: int, block: int) -> Int64Array:
        """Sources of a full time block, int64 [TIME_BLOCK]."""

        def make(_: tuple[int, int]) -> Int64Array:
            stage = self._stages[number]
            first = stage.first_sample + block * TIME_BLOCK
            index = torch.arange(first, first + TIME_BLOCK)
            counter = (index & _LOW_WORD, index >> 32, 0, int(Purpose.MIXTURE_ORDER))
            word0, word1, *_ignored = philox4x32(counter, self._key)
            by_words = np.lexsort((index.numpy(), word1.numpy(), word0.numpy()))
            sources = np.empty(TIME_BLOCK, np.int64)
            sources[by_words] = np.repeat(np.arange(len(self._sources)), stage.before(block + 1) - stage.before(block))
            return sources

        return self._blocks.get((number, block), make)


class _StageCounts:
    """Draws of each source before each time block of a stage, extended as blocks are asked for."""

    def __init__(self, stage: Stage, sources: Sequence[str]) -> None:
        self.first_sample = stage.first_sample
        total = sum(stage.weights.values())
        shares = [stage.weights.get(name, Fraction(0)) / total for name in sources]
        self._scale = int(np.lcm.reduce([share.denominator for share in shares], dtype=object))
        self._parts = [int(share * self._scale) for share in shares]
        self._before: list[list[int]] = [[0] * len(sources)]

    def before(self, block: int) -> Int64Array:
        """Draws since the stage began, before a block: int64 [sources]."""
        while len(self._before) <= block:
            self._before.append(self._next())
        return np.array(self._before[block], dtype=np.int64)

    def _next(self) -> list[int]:
        """Cumulative counts after one more block: the largest remainders are rounded up, and no count ever falls."""
        last, samples = self._before[-1], len(self._before) * TIME_BLOCK
        exact = [divmod(part * samples, self._scale) for part in self._parts]
        counts = [max(floor, count) for (floor, _), count in zip(exact, last, strict=True)]
        left = samples - sum(counts)
        by_remainder = sorted(range(len(counts)), key=lambda source: (-exact[source][1], source))
        for source in [source for source in by_remainder if counts[source] == exact[source][0]][: max(left, 0)]:
            counts[source] += exact[source][1] > 0
        while (left := samples - sum(counts)) != 0:  # rounding up was spent on sources whose time had not come yet
            largest = max(range(len(counts)), key=lambda source: (self._parts[source], -source))
            counts[largest] += left
        return counts
