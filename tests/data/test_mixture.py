"""The mixture law: exact counts, every epoch a permutation, and a past that nothing moves."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megamask.config.identity import growth_problem
from megamask.config.schema.data import DataConfig
from megamask.data import mixture as mixture_module
from megamask.data.content import add_content
from megamask.data.loader import Loader
from megamask.data.mixture import Mixture, stages_of
from megamask.errors import UsageError
from support.shards import flip_bit, random_documents, write_token_corpus

NAMES = ("a", "b", "c", "d")
WEIGHTS = st.lists(st.integers(1, 10**6), min_size=2, max_size=4)


@pytest.fixture(autouse=True)
def _short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixture_module, "TIME_BLOCK", 64)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("mixture")
    for number, name in enumerate(NAMES):
        write_token_corpus(root / name, random_documents(6 + 9 * number, seed=number))
    return {name: str(root / name) for name in NAMES}


def weighted(weights: list[int]) -> dict[str, int]:
    return dict(zip(NAMES, weights, strict=False))


def open_mixture(folders: dict[str, str], stages: list[dict[str, Any]], names: tuple[str, ...] = NAMES) -> Loader:
    corpora = {name: folders[name] for name in names}
    data = DataConfig(corpora=corpora, seed=3, shuffle_window_blocks=2, mixture=stages)
    return Loader(corpora, data, 16)


def mixture(stages: list[dict[str, Any]], names: tuple[str, ...] = NAMES, seed: int = 1) -> Mixture:
    return Mixture(names, stages_of(stages, names, 1), seed)


@settings(max_examples=60)
@given(weights=WEIGHTS, blocks=st.integers(1, 60))
def test_counts_follow_the_weights_within_two_samples(weights: list[int], blocks: int) -> None:
    shares = weighted(weights)
    drawn = mixture([{"weights": shares}], tuple(shares)).consumed(64 * blocks)
    assert sum(drawn.values()) == 64 * blocks
    for name, weight in shares.items():
        exact = Fraction(weight * 64 * blocks, sum(weights))
        assert abs(drawn[name] - exact) < 2


@settings(max_examples=40)
@given(
    weights=WEIGHTS, ends=st.lists(st.integers(1, 400), max_size=2), cut=st.integers(0, 500), size=st.integers(1, 90)
)
def test_draws_of_a_source_count_up_and_are_the_same_from_anywhere(
    weights: list[int], ends: list[int], cut: int, size: int
) -> None:
    stages: list[dict[str, Any]] = [
        {"weights": weighted(weights[turn:] + weights[:turn]), "until_tokens": end}
        for turn, end in enumerate(sorted(set(ends)))
    ]
    stages.append({"weights": weighted(weights)})
    sources, draws = mixture(stages).draws(0, 700)
    for source in range(4):
        assert draws[sources == source].tolist() == list(range(int((sources == source).sum())))
    part = mixture(stages).draws(cut, size)
    assert part[0].tolist() == sources[cut : cut + size].tolist()
    assert part[1].tolist() == draws[cut : cut + size].tolist()
    assert list(mixture(stages).consumed(cut).values()) == np.bincount(sources[:cut], minlength=4).tolist()


@pytest.mark.promise("the past of a mixture does not move when a stage or a corpus is added")
@settings(max_examples=40)
@given(weights=WEIGHTS, later=WEIGHTS, end=st.integers(1, 500))
def test_past_stays_when_the_last_stage_ends_and_others_follow(weights: list[int], later: list[int], end: int) -> None:
    shares = weighted(weights)
    before = mixture([{"weights": shares}], tuple(shares)).draws(0, end)
    grown = mixture([{"weights": shares, "until_tokens": end}, {"weights": weighted(later)}]).draws(0, end)
    assert [values.tolist() for values in before] == [values.tolist() for values in grown]


def test_one_corpus_without_a_mixture_has_the_order_of_its_source(folders: dict[str, str]) -> None:
    with (
        open_mixture(folders, [], ("c",)) as plain,
        open_mixture(folders, [{"weights": {"c": 7}}], ("c",)) as mixed,
        open_mixture(folders, [{"weights": {"c": 1}}]) as among_others,
    ):
        rows = plain.rows(0, 200)
        assert [("c", int(row)) for row in plain.sources["c"].order.rows(0, 200)] == rows
        assert mixed.rows(0, 200) == rows == among_others.rows(0, 200)


@pytest.mark.promise("each epoch of each source of a mixture is a permutation of its rows")
@settings(max_examples=15)
@given(weights=st.lists(st.integers(1, 9), min_size=4, max_size=4), first_end=st.integers(16, 4000))
def test_every_epoch_of_every_source_is_a_permutation(
    folders: dict[str, str], weights: list[int], first_end: int
) -> None:
    stages = [{"weights": weighted(weights), "until_tokens": first_end}, {"weights": weighted(weights[::-1])}]
    with open_mixture(folders, stages) as loader:
        rows = loader.rows(0, 900)
        for name, source in loader.sources.items():
            own, size = [row for which, row in rows if which == name], source.order.num_rows
            for epoch in range(len(own) // size):
                assert sorted(own[epoch * size : (epoch + 1) * size]) == list(range(size))


@settings(max_examples=15)
@given(first=st.integers(0, 500), size=st.sampled_from([8, 16, 48]), ranks=st.sampled_from([1, 2, 4, 8]))
def test_every_number_of_ranks_gives_the_same_batches(
    folders: dict[str, str], first: int, size: int, ranks: int
) -> None:
    stages = [{"weights": {"a": 1, "b": 2, "c": 3, "d": 0.5}}]
    with open_mixture(folders, stages) as loader, open_mixture(folders, stages) as other:
        batch = loader.batch(first, size, range(size))
        shares = [other.batch(first, size, range(rank, size, ranks)) for rank in range(ranks)]
    assert batch.rows == [shares[place % ranks].rows[place // ranks] for place in range(size)]
    assert sum(share.content_sum for share in shares) % 2**64 == batch.content_sum
    for rank, share in enumerate(shares):
        assert torch.equal(share.tokens, batch.tokens[rank::ranks])


def test_mixture_that_reads_alone_equals_the_one_that_reads_ahead(folders: dict[str, str]) -> None:
    stages = [{"weights": {"a": 1, "d": 2}}]
    with open_mixture(folders, stages) as plain, open_mixture(folders, stages) as ahead:
        for first in range(0, 96, 12):
            batch = ahead.batch(first, 12, range(12))
            ahead.prefetch(first + 12, 12, range(12))
            assert batch.content_sum == plain.batch(first, 12, range(12)).content_sum
        assert plain.consumed(96) == {name: sum(which == name for which, _ in plain.rows(0, 96)) for name in NAMES}


def test_corpora_of_different_tokenizers_are_refused(folders: dict[str, str], tmp_path: Path) -> None:
    write_token_corpus(tmp_path / "c", random_documents(4))
    manifest = tmp_path / "c" / "manifest.json"
    content = manifest.read_text().replace('"eod_token_id":61', '"eod_token_id":60')
    digest = open_mixture(folders, [], ("a",)).manifest.tokenizer_digest
    manifest.write_text(content.replace(digest, digest[::-1]))
    with pytest.raises(UsageError, match=r"data\.corpora\.c has tokenizer .* prepare|data\.corpora\.c has tokenizer"):
        open_mixture(folders | {"c": str(tmp_path / "c")}, [{"weights": {"a": 1, "c": 1}}], ("a", "c"))


def test_several_corpora_without_a_mixture_are_refused(folders: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=r"data\.corpora has 2 entries \(a, b\) and data\.mixture has 0 stages"):
        open_mixture(folders, [], ("a", "b"))


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ([{"weights": {"a": 2, "b": 4}}], None),
        ([{"weights": {"a": 1, "b": 2}, "until_tokens": 100}, {"weights": {"c": 1}}], None),
        ([{"weights": {"a": 1, "b": 2}, "until_tokens": 99}, {"weights": {"c": 1}}], "ends at 99 tokens, but"),
        ([{"weights": {"a": 1, "b": 3}}], "stage 1 has other weights"),
        ([], "0 stages"),
    ],
)
def test_growth_of_a_mixture_may_not_move_its_past(given: list[dict[str, Any]], problem: str | None) -> None:
    found = growth_problem([{"weights": {"a": 1, "b": 2}}], given, 100)
    assert (found is None) == (problem is None)
    assert problem is None or problem in str(found)


# --- quarantine


def test_quarantined_row_keeps_its_place_without_an_eligible_token(folders: dict[str, str], tmp_path: Path) -> None:
    write_token_corpus(tmp_path / "e", random_documents(20, seed=9))
    corpora = {"e": str(tmp_path / "e")}
    data = DataConfig(corpora=corpora, seed=3)
    with Loader(corpora, data, 16) as loader:
        rows, whole = loader.rows(0, 20), loader.batch(0, 20, range(20))
    bad = rows[4][1]
    shards = sorted((tmp_path / "e" / "shards").glob("*.tar"))
    offset = 640 + 32 * (bad % 4)
    for shard in shards:  # 3 blocks of 4 rows a shard
        if bad // 12 == shards.index(shard):
            from megamask.data.index import ShardIndex

            index = ShardIndex.unpack(shard.with_suffix(".idx").read_bytes(), name="index")
            offset = int(index.blocks["tokens_offset"][bad % 12 // 4]) + 32 * (bad % 4)
            flip_bit(shard, offset)
    with Loader(corpora, DataConfig(corpora=corpora, seed=3, quarantine=[f"e:{bad}"]), 16) as loader:
        batch = loader.batch(0, 20, range(20))
        assert loader.quarantined["e"].tolist() == [bad]
    assert batch.rows == whole.rows
    assert not batch.is_eligible[4].any()
    others = [place for place in range(20) if place != 4]
    assert torch.equal(batch.tokens[others], whole.tokens[others])
    assert batch.content_sum != whole.content_sum


@pytest.mark.parametrize("entry", ["e:1", "a:x", "a:5-4", "a:999999", "a", "a:1-"])
def test_quarantine_of_no_row_is_refused(folders: dict[str, str], entry: str) -> None:
    corpora = {"a": folders["a"]}
    with pytest.raises(UsageError, match=r"data\.quarantine has"):
        Loader(corpora, DataConfig(corpora=corpora, quarantine=[entry]), 16)


@pytest.mark.promise("a mixture resumed anywhere at another data-parallel size continues with the same bytes")
@settings(max_examples=12)
@given(killed=st.integers(0, 5), sizes=st.tuples(st.sampled_from([1, 2, 3, 6]), st.sampled_from([1, 2, 3, 6])))
def test_mixture_resumed_at_another_size_continues_with_the_same_bytes(
    folders: dict[str, str], killed: int, sizes: tuple[int, int]
) -> None:
    stages = [{"until_tokens": 24 * 16, "weights": {"a": 3, "b": 1}}, {"weights": {"a": 1, "b": 1, "c": 2}}]

    def steps(first: int, last: int, size: int) -> list[tuple[list[list[int]], int, dict[str, int]]]:
        """The batch by place, its content and the counts of each step, read by a loader opened for these steps."""
        found = []
        with open_mixture(folders, stages) as loader:
            for step in range(first, last):
                shares = [loader.batch(12 * step, 12, range(rank, 12, size)) for rank in range(size)]
                for rank in range(size):
                    loader.prefetch(12 * (step + 1), 12, range(rank, 12, size))  # dropped where the run is killed
                rows = {
                    int(place): tokens.tolist()
                    for share in shares
                    for place, tokens in zip(share.batch_position, share.tokens, strict=True)
                }
                content = add_content(*(share.content_sum for share in shares))
                found.append(([rows[place] for place in range(12)], content, loader.consumed(12 * (step + 1))))
        return found

    resumed = steps(0, killed, sizes[0]) + steps(killed, 6, sizes[1])
    assert resumed == steps(0, 6, 1)
