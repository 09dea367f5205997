"""inspect: the samples of a step, recomputed here once more in plain Python integers and compared."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megamask.config.dump import to_yaml
from megamask.config.load import load_train_config
from megamask.config.schema.data import DataConfig
from megamask.config.schema.roots import TrainConfig
from megamask.data.loader import Loader
from megamask.data.manifest import Manifest
from megamask.data.reader import SplitReader
from megamask.errors import DataIntegrityError, ExitCode, UsageError
from megamask.runs.configs import store_attempt_config
from megamask.runs.laws import LAWS
from megamask.runs.record import open_run
from megamask.storage.hashing import hash_of, key_of
from megamask.tracking.journal.writer import Journal
from megamask_pipelines.cli import inspect as cli
from support.order_oracle import draw_rows, philox4x32_10
from support.records import edit_run_record
from support.shards import flip_bit
from support.tiny_run import write_corpus

SEED = 2**40 + 9
BATCH = 6


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    return write_corpus(
        folder, sequence_length=16, documents=9, lengths=(1, 60), validation_fraction=0.2, blocks_per_shard=3
    )


CONFIG = """
run: {{name: run, output_dir: {output_dir}, seed: {seed}}}
model: {{num_layers: 2, hidden_size: 32, num_attention_heads: 2, ffn_hidden_size: 64}}
data: {{corpora: {{main: {corpus}}}, seed: 5, shuffle_window_blocks: 2}}
objective: {{noise_schedule: {schedule}}}
optimizer: {{learning_rate: 0.001}}
training: {{steps: {steps}, global_batch_size: {batch}, sequence_length: 16}}
"""


def config_of(corpus: Path, folder: Path, *, steps: int = 50, schedule: str = "linear") -> TrainConfig:
    text = CONFIG.format(output_dir=folder, corpus=corpus, seed=SEED, batch=BATCH, steps=steps, schedule=schedule)
    (folder / "config.yaml").write_text(text)
    return load_train_config(folder / "config.yaml").config


def make_run(corpus: Path, folder: Path, **options: Any) -> Path:
    config = config_of(corpus, folder, **options)
    run_dir = folder / "run"
    manifest = Manifest.load(corpus)
    open_run(
        run_dir,
        config,
        corpora={"main": manifest.corpus_id},
        tokenizer_digest=manifest.tokenizer_digest,
        code_version="test",
    )
    store_attempt_config(run_dir, 1, config)
    return run_dir


@pytest.fixture
def run_dir(prepared: Path, tmp_path: Path) -> Path:
    return make_run(prepared, tmp_path)


def inspect(run_dir: Path, step: int | str, *more: str, as_json: bool = True) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    arguments = parser.parse_args([str(run_dir), "--step", str(step), *more])
    arguments.json = as_json
    return cli.run(arguments)


def expected_times(step: int, mask_probability: Callable[[float], float]) -> list[tuple[float, int]]:
    """(t, T) of each place, from the noise law."""
    key = (SEED % 2**32, SEED // 2**32)
    word0, word1, _, _ = philox4x32_10(((step - 1) % 2**32, (step - 1) // 2**32, 0, 2), key)
    u = (word0 * 2**21 + word1 // 2**11) * 2.0**-53
    times = [(u + place / BATCH) % 1.0 for place in range(BATCH)]
    return [(t, int((1e-3 + (1 - 2e-3) * mask_probability(t)) * 2**32)) for t in times]


def expected_masked(index: int, tokens: list[int], pad: int, limit: int) -> list[int]:
    key = (SEED % 2**32, SEED // 2**32)
    return [
        position
        for position, token in enumerate(tokens)
        if token != pad and philox4x32_10((index % 2**32, index // 2**32, position // 4, 1), key)[position % 4] < limit
    ]


def test_one_sample_is_shown_by_its_index(run_dir: Path) -> None:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    arguments = parser.parse_args([str(run_dir), "--sample", str(2 * BATCH + 1)])
    arguments.json = True
    assert cli.run(arguments)["samples"] == [inspect(run_dir, 3)["samples"][1]]


@pytest.mark.promise("`megamask inspect` recomputes samples and masks from the laws")
@pytest.mark.parametrize("step", [1, 2, 37])
def test_inspect_recomputes_samples_and_masks_from_the_laws(run_dir: Path, prepared: Path, step: int) -> None:
    manifest = Manifest.load(prepared)
    reader = SplitReader(prepared, manifest, "train")
    source = hash_of(*[shard.sha256 for shard in manifest.split("train").shards])
    first = (step - 1) * BATCH
    rows = draw_rows(reader.block_rows.tolist(), first, BATCH, key_of(hash_of(5, source, "train")), 2)
    times = expected_times(step, lambda t: t)
    report = inspect(run_dir, step)
    assert (report["step"], report["seed"]) == (step, SEED)
    assert len(report["samples"]) == BATCH
    for place, sample in enumerate(report["samples"]):
        row = reader.read(rows[place])
        tokens = row.tokens.tolist()
        t, limit = times[place]
        assert sample == {
            "sample_index": first + place,
            "source": "main",
            "row": rows[place],
            "t": pytest.approx(t, abs=1e-15),
            "tokens": tokens,
            "num_padding": tokens.count(manifest.pad_token_id),
            "masked": expected_masked(first + place, tokens, manifest.pad_token_id, limit),
            "documents": [{"start": start, "number": number} for start, number in row.documents.tolist()],
        }
    json.dumps(report)


def test_masks_follow_the_schedule_of_the_run(prepared: Path, tmp_path: Path) -> None:
    import math

    run_dir = make_run(prepared, tmp_path, schedule="cosine_bd3")
    pad = Manifest.load(prepared).pad_token_id
    times = expected_times(3, lambda t: 1 - math.cos(math.pi * t / 2))
    for (_, limit), sample in zip(times, inspect(run_dir, 3)["samples"], strict=True):
        assert sample["masked"] == expected_masked(sample["sample_index"], sample["tokens"], pad, limit)


def test_padding_is_shown_counted_and_never_masked(run_dir: Path, prepared: Path) -> None:
    manifest = Manifest.load(prepared)
    padding = manifest.split("train").num_padding
    assert padding > 0
    steps = -(-manifest.split("train").num_rows // BATCH)
    samples = [sample for step in range(1, steps + 1) for sample in inspect(run_dir, step)["samples"]]
    padded = [sample for sample in samples if sample["num_padding"]]
    assert padded
    for sample in padded:
        assert sample["num_padding"] == padding
        assert sample["tokens"][-padding:] == [manifest.pad_token_id] * padding
        assert all(position < 16 - padding for position in sample["masked"])


def journal_line(run_dir: Path, prepared: Path, step: int, **changed: Any) -> None:
    data = DataConfig(corpora={"main": str(prepared)}, seed=5, shuffle_window_blocks=2)
    report = inspect(run_dir, step)
    with Loader(data.corpora, data, 16) as loader:
        content = f"{loader.batch((step - 1) * BATCH, BATCH, range(BATCH)).content_sum:016x}"
    journal = Journal.open(run_dir, 1)
    journal.append(
        "step", **{"step": step, "batch_digest": report["batch_digest"], "content_digest": content} | changed
    )
    journal.close()


def test_journal_of_the_run_is_compared(run_dir: Path, prepared: Path) -> None:
    assert inspect(run_dir, 4)["matches_journal"] is None
    journal_line(run_dir, prepared, 4)
    assert inspect(run_dir, 4)["matches_journal"] is True
    assert inspect(run_dir, 5)["matches_journal"] is None


def test_masked_tokens_are_those_of_the_first_view_and_compared(run_dir: Path, prepared: Path) -> None:
    report = inspect(run_dir, 4)
    count = sum(len(sample["masked"]) for sample in report["samples"])
    assert report["masked_tokens"] == count > 0
    journal_line(run_dir, prepared, 4, masked_tokens=count + 1)
    with pytest.raises(DataIntegrityError, match=f"recomputed masked_tokens is {count}, .* has {count + 1}"):
        inspect(run_dir, 4)


@pytest.mark.parametrize("name", ["batch_digest", "content_digest"])
def test_journal_with_another_digest_is_an_integrity_error(run_dir: Path, prepared: Path, name: str) -> None:
    journal_line(run_dir, prepared, 4, **{name: "0" * 16})
    with pytest.raises(DataIntegrityError, match=f"recomputed {name} is .* has 0000000000000000") as caught:
        inspect(run_dir, 4)
    assert caught.value.exit_code == ExitCode.DATA_INTEGRITY


def test_text_for_a_person_hides_what_is_masked(run_dir: Path, prepared: Path) -> None:
    report = inspect(run_dir, 2, as_json=False)
    text = cli.render(report)
    assert "step 2, seed" in text
    for sample in report["samples"]:
        assert f"sample {sample['sample_index']}: main row {sample['row']}" in text
        assert sample["text"] in text
        assert ("\u2591" in sample["text"]) == bool(sample["masked"])
        for document in sample["documents"]:
            assert document["input"].endswith(".txt")
            assert f"document {document['number']} ({document['input']})" in text
    assert any(sample["masked"] for sample in report["samples"])


def test_newest_config_says_where_the_corpus_is(run_dir: Path, prepared: Path, tmp_path: Path) -> None:
    before = inspect(run_dir, 1)
    moved = Path(shutil.copytree(prepared, tmp_path / "moved"))
    (run_dir / "config" / "attempt-0002.yaml").write_text(to_yaml(config_of(moved, tmp_path, steps=60)))
    flip_bit(moved / "manifest.json", 40)
    with pytest.raises((DataIntegrityError, UsageError), match="moved"):
        inspect(run_dir, 1)
    flip_bit(moved / "manifest.json", 40)
    assert inspect(run_dir, 1) == before
    assert inspect(run_dir, 60)["step"] == 60


def test_corpus_that_moved_can_be_named(run_dir: Path, prepared: Path, tmp_path: Path) -> None:
    before = inspect(run_dir, 1)
    moved = Path(shutil.copytree(prepared, tmp_path / "moved"))
    (run_dir / "config" / "attempt-0002.yaml").write_text(to_yaml(config_of(tmp_path / "gone", tmp_path)))
    with pytest.raises(UsageError, match=r"data\.corpora\.main is .*gone"):
        inspect(run_dir, 1)
    assert inspect(run_dir, 1, "--corpus", f"main={moved}") == before


def test_another_corpus_is_an_integrity_error(run_dir: Path, prepared: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(prepared, tmp_path / "other"))
    edit_run_record(run_dir, corpora={"main": "0" * 64})
    with pytest.raises(DataIntegrityError, match="the run was made with 0000") as caught:
        inspect(run_dir, 1, "--corpus", f"main={other}")
    assert caught.value.exit_code == ExitCode.DATA_INTEGRITY


def test_damaged_row_is_an_integrity_error(run_dir: Path, prepared: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(prepared, tmp_path / "damaged"))
    for path in (damaged / "shards").glob("train-*.tar"):
        flip_bit(path, 640 + 5)
    steps = -(-Manifest.load(prepared).split("train").num_rows // BATCH)
    with pytest.raises(DataIntegrityError, match="row 0 of the block"):
        for step in range(1, steps + 1):
            inspect(run_dir, step, "--corpus", f"main={damaged}")


class TestRefusals:
    """Each ends with exit code 2 and names what to change."""

    def refused(self, match: str, *arguments: Any) -> None:
        with pytest.raises(UsageError, match=match) as caught:
            inspect(*arguments)
        assert caught.value.exit_code == ExitCode.USAGE

    @pytest.mark.parametrize("step", [0, -1, 51])
    def test_step_outside_the_run_is_refused(self, run_dir: Path, step: int) -> None:
        self.refused(f"--step is {step}; allowed: 1 to 50", run_dir, step)

    def test_missing_run_is_refused(self, tmp_path: Path) -> None:
        self.refused("nowhere is not a run directory", tmp_path / "nowhere", 1)

    def test_folder_without_run_json_is_refused(self, tmp_path: Path) -> None:
        self.refused(r"it has no run\.json", tmp_path, 1)

    def test_run_without_config_is_refused(self, run_dir: Path) -> None:
        (run_dir / "config" / "attempt-0001.yaml").unlink()
        self.refused(r"no attempt-NNNN\.yaml", run_dir, 1)

    @pytest.mark.parametrize("law", ["order", "noise"])
    def test_run_of_other_laws_is_refused(self, run_dir: Path, law: str) -> None:
        edit_run_record(run_dir, laws=LAWS | {law: 2})
        self.refused(f"version 2 of the {law} law", run_dir, 1)

    @pytest.mark.parametrize("pair", ["main", "=folder", "main="])
    def test_corpus_argument_of_another_form_is_refused(self, run_dir: Path, pair: str) -> None:
        self.refused("allowed: NAME=FOLDER", run_dir, 1, "--corpus", pair)

    def test_corpus_name_that_the_run_does_not_have_is_refused(self, run_dir: Path, prepared: Path) -> None:
        self.refused("--corpus names other, .* allowed: main", run_dir, 1, "--corpus", f"other={prepared}")
