"""`initialise.source`: a run that starts from a published model, resumed, inspected, exported; and refusals."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megamask.checkpoint.commit import load_commit
from megamask.checkpoint.standalone import load_checkpoint
from megamask.config.load import load_train_config
from megamask.config.validate import validate_train
from megamask.conversion.importing import import_model, read_published
from megamask.engine.state.restore import canonical_reader
from megamask.errors import UsageError
from megamask.evaluation.request import EvaluationRequest
from megamask.training.run_data import RunData
from megamask_pipelines.convert import to_hub
from megamask_pipelines.evaluate import evaluate
from support.command import checkpoints, journal, megamask, step_lines, tiny
from support.hub_models import save_hub_folder

pytestmark = pytest.mark.multiprocess

MODEL = (
    "model.num_layers=3",
    "model.hidden_size=64",
    "model.ffn_hidden_size=96",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.rope_theta=500000.0",
    "model.norm_eps=1e-5",
)
KIT = (
    "initialise.shift={until_step: 4}",
    "initialise.attention_annealing_steps=5",
    "initialise.mask_ratio_warmup_steps=3",
    "objective.complementary=false",
    "initialise.embedding_noise_steps=3",
    "optimizer.lr_multipliers=['*.self_attn.*=2', 'model.norm.weight=0']",
    "initialise.mask_row=mean",
    "training.steps=6",
    "checkpoint.every_steps=2",
)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with one row less than the corpus has ids, so that the mask token's row is new."""
    folder = tmp_path_factory.mktemp("published") / "model"
    save_hub_folder(folder, "llama", vocab_size=299)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, small_corpus: Path, published: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    done = megamask(
        "train", *tiny(small_corpus, folder, "straight"), f"initialise.source=hf:{published}", *MODEL, *KIT, "--json"
    )
    assert done.code == 0, done.stderr
    return folder / "straight"


@pytest.mark.promise("A run that starts from a published model records it, and resumes bit for bit without it")
def test_a_resumed_run_takes_the_same_steps(tmp_path: Path, small_corpus: Path, published: Path, trained: Path) -> None:
    arguments = (*tiny(small_corpus, tmp_path, "again"), *MODEL, *KIT, "--json")
    moved = tmp_path / "model"
    moved.symlink_to(published)
    stopped = megamask("train", *arguments, f"initialise.source=hf:{moved}", "training.stop_after_step=2")
    assert stopped.code == 0, stopped.stderr
    moved.unlink()
    done = megamask("train", *arguments, f"initialise.source=hf:{moved}")
    assert done.code == 0, done.stderr
    one, other = step_lines(trained), step_lines(tmp_path / "again")
    assert {step: line["loss"] for step, line in one.items()} == {step: line["loss"] for step, line in other.items()}
    assert [line["grad_norm"] for line in one.values()] == [line["grad_norm"] for line in other.values()]


def test_the_source_is_on_record(trained: Path, published: Path) -> None:
    record = json.loads((trained / "run.json").read_text())
    [started] = [line for line in journal(trained) if line["kind"] == "attempt_started"]
    assert record["parent_checkpoint"] == started["initialised_from"]
    assert started["initialised_from"] | {"digest": ""} == {
        "source": f"hf:{published}",
        "digest": "",
        "family": "llama",
        "target_shift": True,
        "mask_row": "mean",
    }
    assert record["identity"]["initialise.attention_annealing_steps"] == 5


def test_a_frozen_tensor_stays_as_it_was_imported(trained: Path, published: Path) -> None:
    checkpoint = load_checkpoint(trained)
    read, model = canonical_reader(checkpoint.commit.folder, checkpoint.model.spec), read_published(published)
    assert torch.equal(read("model.norm.weight"), model.canonical("model.norm.weight"))
    assert not torch.equal(
        read("model.layers.0.input_layernorm.weight"), model.canonical("model.layers.0.input_layernorm.weight")
    )


@pytest.mark.promise("A target shift is in force in evaluation and export exactly as long as it was trained")
def test_the_shift_ends_where_the_config_ends_it(trained: Path, tmp_path: Path) -> None:
    by_step = {folder.name[5:13]: folder for folder in checkpoints(trained)}
    for step, is_shifted in (("00000004", True), ("00000006", False)):
        checkpoint = load_checkpoint(by_step[step])
        row = torch.zeros(1, 8, dtype=torch.int64)
        reading = checkpoint.objective.decoder.reading(row, row == 0)
        assert (reading.shift == 1) is is_shifted
        to_hub(by_step[step], tmp_path / step, family_name=None, number_format=None)
        assert json.loads((tmp_path / step / "megamask.json").read_text())["target_shift"] is is_shifted


def test_inspect_recomputes_the_masks_of_the_warm_up(trained: Path) -> None:
    for step in ("1", "4", "6"):
        done = megamask("inspect", trained, "--step", step, "--json")
        assert done.code == 0, done.stderr
        assert done.json["matches_journal"] is True
        assert all(0 not in sample["masked"] for sample in done.json["samples"]) is (step != "6")


@pytest.mark.promise("Block sizes grow from 1 on a published model, resume bit for bit, and inspect shows their masks")
def test_block_size_warm_up_from_a_published_model(tmp_path: Path, small_corpus: Path, published: Path) -> None:
    schedule = (
        "objective.name=block",
        "objective.block_schedule=[0:1,2:4,4:L]",
        "initialise.mask_row=mean",
        "initialise.embedding_noise_steps=3",
        "training.steps=6",
        "checkpoint.every_steps=3",
        *("evaluation.every_steps=3", "evaluation.rows=2", "evaluation.draws=1", "evaluation.replicates=2"),
        f"initialise.source=hf:{published}",
    )
    for name, stop in (("whole", ()), ("parts", ("training.stop_after_step=3",)), ("parts", ())):
        done = megamask("train", *tiny(small_corpus, tmp_path, name), *MODEL, *schedule, *stop, "--json")
        assert done.code == 0, done.stderr
    whole, parts = step_lines(tmp_path / "whole"), step_lines(tmp_path / "parts")
    assert [whole[step] for step in range(1, 7)] == [parts[step] for step in range(1, 7)]
    for step in ("2", "3", "6"):
        shown = megamask("inspect", tmp_path / "whole", "--step", step, "--json")
        assert shown.json["matches_journal"] is True
        # the shift of the source is kept: the first token of a row is given
        assert all(sample["masked"] and 0 not in sample["masked"] for sample in shown.json["samples"])
    lines = {line["step"]: line for line in journal(tmp_path / "whole") if line["kind"] == "evaluation"}
    assert {step: (line["objective"], line["bound_from_step"]) for step, line in lines.items()} == {
        3: ({"name": "block", "block_size": 4, "target_shift": True}, 3),
        6: ({"name": "masked", "target_shift": True}, 5),
    }
    for folder in checkpoints(tmp_path / "whole"):  # a checkpoint is measured as the phase that it was trained in
        found = evaluate(folder, EvaluationRequest(rows=2, draws=1, replicates=2))
        bound = lines[found["step"]]["nelbo_nats_per_token"]
        assert found["nelbo_nats_per_token"] == pytest.approx(bound, rel=1e-5)
        assert load_commit(folder).bound == bound


def _open(small_corpus: Path, tmp_path: Path, *overrides: str) -> RunData:
    loaded = load_train_config(
        tiny(small_corpus, tmp_path, "refused")[0], [*tiny(small_corpus, tmp_path, "refused")[1:], *overrides]
    )
    validate_train(loaded.config, loaded.origins)
    with contextlib.ExitStack() as stack:
        return RunData(loaded.config, stack)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (("model.hidden_size=128",), r"model.embed_tokens.weight is \[299, 64\] in the source and \[299, 128\] here"),
        (("model.num_layers=2",), "model.layers.2.input_layernorm.weight is only in the source"),
        (("model.qk_norm=true",), "model.layers.0.self_attn.q_norm.weight is only here"),
        (("model.rope_theta=1e4",), "model.rope_theta is 500000.0 in the source and 10000.0 here"),
        ((), "initialise.mask_row is null"),
        (("initialise.mask_row=299",), "allowed: unused, mean, or an id from 0 to 298"),
        (("initialise.source=hf:/nowhere",), "is not a folder"),
        (("initialise.source=/nowhere",), "/nowhere is not a folder"),
    ],
)
@pytest.mark.promise("A source that does not fit the run is refused before anything starts, tensor by tensor")
def test_a_source_that_does_not_fit_is_refused(
    tmp_path: Path, small_corpus: Path, published: Path, overrides: tuple[str, ...], named: str
) -> None:
    with pytest.raises(UsageError, match=named) as refusal:
        _open(small_corpus, tmp_path, *MODEL, f"initialise.source=hf:{published}", *overrides)
    assert "Nothing was" in str(refusal.value)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (("initialise.mask_row=mean",), "initialise.mask_row is 'mean', but initialise.source is null"),
        (("initialise.source=x", "initialise.shift=sometimes"), "allowed: keep, drop"),
        (("initialise.source=x", "objective.name=autoregressive", "initialise.shift=drop"), "always predict the next"),
        (
            ("initialise.source=x", "objective.name=block", "initialise.attention_annealing_steps=3"),
            "objective.name masked",
        ),
        (("optimizer.lr_multipliers=['*=-1']",), "optimizer.lr_multipliers"),
        (("initialise.source=x", "initialise.mask_ratio_warmup_steps=3"), "objective.complementary=false"),
    ],
)
def test_settings_that_contradict_one_another_are_refused(
    tmp_path: Path, small_corpus: Path, overrides: tuple[str, ...], named: str
) -> None:
    with pytest.raises(UsageError, match=named):
        _open(small_corpus, tmp_path, *overrides)


def test_a_checkpoint_of_another_vocabulary_needs_its_tokenizer(tmp_path: Path, small_corpus: Path) -> None:
    save_hub_folder(tmp_path / "model", "llama", vocab_size=100)
    import_model(tmp_path / "checkpoint", read_published(tmp_path / "model"))
    arguments: tuple[Any, ...] = (*MODEL, f"initialise.source={tmp_path / 'checkpoint'}", "initialise.mask_row=mean")
    with pytest.raises(UsageError, match="tokenizer mismatch: the corpus' tokenizer has 300 entries"):
        _open(small_corpus, tmp_path, *arguments)
