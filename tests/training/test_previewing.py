"""Previews: what they decode, who decodes it, and when."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megamask.config.load import load_train_config
from megamask.config.schema.roots import TrainConfig
from megamask.data.loader import Loader
from megamask.diffusion.sampling import Draw, Prediction
from megamask.errors import UsageError
from megamask.objectives.base import Reading
from megamask.training.metrics import StepRecord
from megamask.training.previewing import (
    PeriodicPreview,
    PreviewRows,
    open_previews,
    preview_on_engine,
    preview_seed,
)
from megamask.training.progress import Progress
from megamask.training.stopping import StopFlag, StopReason
from support.command import TINY
from support.model_documents import model_document
from support.thread_world import ThreadWorld
from support.tiny_run import SEQUENCE_LENGTH, write_corpus

OBJECTIVE = model_document().objective


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Loader:
    folder = write_corpus(tmp_path_factory.mktemp("previewing"))
    loaded = configured(f"data.corpora.main={folder}")
    return Loader(loaded.data.corpora, loaded.data, SEQUENCE_LENGTH)


def configured(*overrides: str) -> TrainConfig:
    length = f"training.sequence_length={SEQUENCE_LENGTH}"
    return load_train_config(TINY, [length, "preview.every_steps=2", "preview.num_tokens=6", *overrides]).config


def opened(corpus: Loader, *overrides: str) -> tuple[TrainConfig, PreviewRows]:
    config = configured("preview.prompts=['alpha beta', '', 'gamma', 'h\u00e9']", *overrides)
    rows = open_previews(config, OBJECTIVE, corpus)
    assert rows is not None
    return config, rows


def test_row_is_the_prompt_then_masks_of_which_some_are_filled(corpus: Loader) -> None:
    _, rows = opened(corpus)
    for prompt, tokens, is_wanted in zip(rows.prompts, rows.tokens.tolist(), rows.is_wanted.tolist(), strict=True):
        ids = corpus.tokenizer.encode(prompt)
        num_masks = SEQUENCE_LENGTH - len(ids)
        assert tokens == ids + [corpus.manifest.mask_token_id] * num_masks
        assert is_wanted == [False] * len(ids) + [True] * 6 + [False] * (num_masks - 6)


def test_previews_that_are_not_asked_for_read_no_prompt(corpus: Loader) -> None:
    assert (
        open_previews(
            configured("preview.every_steps=null", "preview.prompts=['" + "x" * 999 + "']"), OBJECTIVE, corpus
        )
        is None
    )


def test_prompt_that_does_not_fit_is_refused_with_the_number_that_does(corpus: Loader) -> None:
    prompt = "zq" * 13 + "z"  # 27 tokens: 26 would fit
    with pytest.raises(UsageError) as caught:
        open_previews(configured(f"preview.prompts=['', '{prompt}']"), OBJECTIVE, corpus)
    assert f"preview.prompts: '{prompt}' has 27 tokens" in caught.value.message
    assert "allowed: prompts of at most 26 tokens. Nothing was started." in caught.value.message
    assert open_previews(configured(f"preview.prompts=['{prompt[:-1]}']"), OBJECTIVE, corpus) is not None


def test_temperature_is_refused_where_the_noise_law_has_no_numbers(corpus: Loader) -> None:
    huge = SimpleNamespace(manifest=SimpleNamespace(vocab_size=2**29, mask_token_id=3), tokenizer=corpus.tokenizer)
    with pytest.raises(UsageError, match=r"preview\.temperature is 1\.0.*allowed: 0"):
        open_previews(configured("preview.temperature=1"), OBJECTIVE, huge)  # type: ignore[arg-type]


@pytest.mark.promise("a preview's record is sufficient to reproduce it")
def test_seed_is_the_key_of_the_run_seed_and_the_word_preview() -> None:
    digest = hashlib.sha256(b'[7,"preview"]\n').digest()
    assert preview_seed(7) == int.from_bytes(digest[:8], "little")


class FakeEngine:
    """A network whose choice depends on the row, the position, the step and the row's number; counts its calls."""

    def __init__(self, world: ThreadWorld, rank: int, data: int) -> None:
        self._rank = world.engines[rank]
        self._world = world
        self.mesh = SimpleNamespace(data_parallel_rank=rank % data, data_parallel_size=data)
        self.num_calls = 0

    def predict(self, reading: Reading, draw: Draw) -> Prediction:
        self.num_calls += 1
        row, place = reading.is_read.nonzero().T
        value = reading.inputs.sum(dim=1)[row] * 31 + place * 7 + draw.step + 5 * torch.tensor(draw.sequences)[row]
        return Prediction(tokens=value % 250, confidence=1.0 / (1 + value % 97).double())

    def max_over_ranks(self, value: int) -> int:
        return max(self._world.exchange(self._rank.rank, value))

    def gather_objects(self, value: Any) -> list[Any]:
        return self._world.exchange(self._rank.rank, value)


def previews(config: TrainConfig, rows: PreviewRows, *, data: int, ranks: int) -> tuple[list[Any], list[FakeEngine]]:
    world = ThreadWorld(ranks)
    engines = [FakeEngine(world, rank, data) for rank in range(ranks)]
    results = world.run(lambda rank: preview_on_engine(config, engines[rank.rank], OBJECTIVE, rows)())  # type: ignore[arg-type]
    return results, engines


@pytest.mark.promise("replicas share the prompts; each decodes only its own")
@pytest.mark.parametrize(("data", "ranks"), [(2, 2), (3, 3), (2, 4), (6, 6)])
def test_every_layout_writes_what_one_process_writes(corpus: Loader, data: int, ranks: int) -> None:
    """Six coordinates have more than the four prompts: two of them have nothing to decode."""
    config, rows = opened(corpus, "preview.denoising_steps=4")
    [[expected], _] = previews(config, rows, data=1, ranks=1)
    assert [sample["prompt"] for sample in expected["samples"]] == rows.prompts
    results, engines = previews(config, rows, data=data, ranks=ranks)
    for result in results:
        assert {**result, "seconds": None} == {**expected, "seconds": None}
    assert [engine.num_calls for engine in engines] == [4 if rank % data < 4 else 0 for rank in range(ranks)]


@pytest.mark.promise("a signal during an evaluation or a preview ends it between two passes, on every rank")
@pytest.mark.parametrize(("data", "ranks"), [(1, 1), (2, 4), (6, 6)])
def test_signal_to_one_rank_cuts_the_preview_short_on_every_rank(corpus: Loader, data: int, ranks: int) -> None:
    config, rows = opened(corpus, "preview.denoising_steps=4")
    world = ThreadWorld(ranks)
    engines = [FakeEngine(world, rank, data) for rank in range(ranks)]

    def write(rank: Any) -> Any:
        engine = engines[rank.rank]
        signals = SimpleNamespace(requested=0)
        stop = StopFlag(engine, signals=signals, is_superseded=lambda: False, num_steps=9, stop_after_step=None)
        asked = 0

        def check() -> None:
            nonlocal asked
            asked += 1
            signals.requested = 75 if (asked, rank.rank) == (3, ranks - 1) else 0
            stop.check()

        return preview_on_engine(config, engine, OBJECTIVE, rows, check)()  # type: ignore[arg-type]

    assert world.run(write) == [None] * ranks
    assert max(engine.num_calls for engine in engines) == 2


@pytest.mark.promise("a preview's record is sufficient to reproduce it")
def test_record_has_what_it_takes_to_write_it_again(corpus: Loader) -> None:
    config, rows = opened(corpus, "preview.temperature=0.5")
    [[record], _] = previews(config, rows, data=1, ranks=1)
    assert record.keys() == {"samples", "denoising_steps", "temperature", "seed", "seconds"}
    assert (record["denoising_steps"], record["temperature"]) == (6, 0.5)
    assert record["seed"] == preview_seed(config.run.seed)
    for place, sample in enumerate(record["samples"]):
        assert sample.keys() == {"prompt", "text", "num_tokens", "nfe", "sequence"}
        assert (sample["num_tokens"], sample["nfe"], sample["sequence"]) == (6, 6, place)


@pytest.mark.promise("no byte sequence from the network makes a preview fail")
def test_text_ends_at_the_end_of_document_and_no_bytes_make_it_fail(corpus: Loader) -> None:
    _, rows = opened(corpus)
    tokenizer = corpus.tokenizer
    start, eod = rows.starts[0], corpus.manifest.eod_token_id
    ids = rows.tokens[0].tolist()
    ids[start : start + 6] = [*tokenizer.encode("zq"), eod, *tokenizer.encode("xyz")]
    assert rows.text(0, ids) == "zq"
    ids[start : start + 6] = [*tokenizer.encode("\u00fc")[:1], *tokenizer.encode("zqxyz")]
    assert len(tokenizer.encode("\u00fc")) == 2
    assert rows.text(0, ids) == "\ufffdzqxyz"


def test_preview_is_due_by_step_only() -> None:
    records: list[tuple[str, int]] = []
    recorder = SimpleNamespace(append=lambda kind, **fields: records.append((kind, fields["step"])))
    hook = PeriodicPreview(recorder, 3, lambda: {"samples": []})
    silent = PeriodicPreview(recorder, None, None)
    record = StepRecord(report=None, fields={})  # type: ignore[arg-type]
    for step in range(1, 8):
        hook.after_step(Progress(step=step, num_views=2), record)
        silent.after_step(Progress(step=step, num_views=2), record)
    hook.on_stop(Progress(step=7, num_views=2), StopReason.PREEMPTED)
    assert records == [("sample_preview", 3), ("sample_preview", 6)]
