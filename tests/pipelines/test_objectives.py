"""Every objective on a real corpus: 300 steps on two layouts with equal losses, a restart bit for bit, inspection."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.command import ROOT, TINY, VOLATILE, megamask

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess, pytest.mark.timeout(3600)]

STEPS, STOP = 300, 150
# At the tiny run's own 3e-3 the rounding of sums grows by orders of magnitude within 100 steps, and shows nothing about
# layouts then; at this rate it stays at 1e-7 for 300 steps.
LEARNING_RATE = "optimizer.learning_rate=5e-4"
BLOCK = "objective.name=block"
OBJECTIVES = {
    "exact": ("objective.mask_counts=exact", "objective.random_length_fraction=0.1", "data.isolate_documents=true"),
    "until_tokens": (f"objective.complementary_until_tokens={100 * 8 * 64}", "objective.noise_schedule=sqrt"),
    "md4": ("objective.recipe=md4",),
    "importance": ("objective.time_sampling=importance",),
    "spindle": ("objective.noise_schedule=spindle",),
    "schedule": (
        BLOCK,
        "objective.block_schedule=[0:1,40:4,80:16,120:L,200:16]",
        "evaluation.every_steps=75",
        "evaluation.rows=4",
    ),
    "clipped": (BLOCK, "objective.block_size=16", "objective.clip_low=0.3", "objective.clip_high=0.8"),
    "joint": (
        BLOCK,
        "objective.block_size=8",
        "objective.complementary=true",
        "objective.clean_half=token_causal",
        "objective.diffusion_weight=0.3",
        "data.isolate_documents=true",
    ),
    "autoregressive": ("objective.name=autoregressive", "data.isolate_documents=true"),
    "uniform": ("objective.name=uniform",),
    "mixed": ("objective.name=mixed",),
    "edit": ("objective.name=mixed", "objective.corruption=edit"),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stdlib") / "corpus"
    done = megamask(
        "prepare",
        ROOT / "configs" / "corpus" / "python_stdlib.yaml",
        "corpus.inputs=['{python_stdlib}/[a-d]*.py']",
        f"corpus.output_dir={folder}",
        "corpus.sequence_length=64",
    )
    assert done.code == 0, done.stderr
    return folder


def train(corpus: Path, folder: Path, name: str, *overrides: str) -> None:
    done = megamask(
        "train",
        TINY,
        f"data.corpora.main={corpus}",
        f"run.output_dir={folder}",
        f"run.name={name}",
        f"training.steps={STEPS}",
        "training.sequence_length=64",
        LEARNING_RATE,
        "checkpoint.every_steps=150",
        "tracking.mlflow.enabled=false",
        *overrides,
        timeout=1800,
    )
    assert done.code == 0, done.stderr


def steps(folder: Path, name: str) -> list[dict]:
    files = sorted((folder / name / "journal").glob("*.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in VOLATILE} for line in lines if line["kind"] == "step"
    ]


@pytest.mark.promise("every objective trains on two layouts with equal losses and resumes bit for bit, on a corpus")
@pytest.mark.parametrize("name", OBJECTIVES)
def test_objective_trains_resumes_and_is_inspected(name: str, corpus: Path, tmp_path: Path) -> None:
    settings = OBJECTIVES[name]
    train(corpus, tmp_path, "whole", *settings)
    train(corpus, tmp_path, "resumed", *settings, f"training.stop_after_step={STOP}")
    train(corpus, tmp_path, "resumed", *settings)
    train(corpus, tmp_path, "parallel", *settings, "layout.tensor_parallel_size=2", "layout.sequence_parallel=true")
    whole, parallel = steps(tmp_path, "whole"), steps(tmp_path, "parallel")
    assert len(whole) == STEPS
    assert steps(tmp_path, "resumed") == whole
    for one, other in zip(whole, parallel, strict=True):
        exact = ("masked_tokens", "batch_digest", "content_digest", "consumed_tokens", "processed_tokens")
        assert {key: one[key] for key in exact} == {key: other[key] for key in exact}
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
    if name not in ("schedule", "until_tokens"):  # a phase has a loss of its own
        start, end = (sum(step["loss"] for step in part) / 30 for part in (whole[:30], whole[-30:]))
        assert end < start
    for step in (20, STOP, 250):
        found = megamask("inspect", tmp_path / "whole", "--step", str(step), "--json").json
        assert found["matches_journal"] is True
        assert all(sample.get("masked") or sample.get("scored") for sample in found["samples"][:4])
    checked = megamask("verify", "run", tmp_path / "whole", "--json")
    assert checked.code == 0, checked.stdout
    explained = megamask("explain", "objective.name", "--json")
    assert explained.code == 0 and "uniform" in explained.stdout


def test_fine_tuning_trains_on_answers(tmp_path: Path) -> None:
    lines = []
    for number in range(400):
        a, b = number % 20, number // 20
        messages = [
            {"role": "user", "content": f"what is {a} plus {b}?"},
            {"role": "assistant", "content": f"it is {a + b}."},
        ]
        lines.append(json.dumps({"messages": messages}))
    (tmp_path / "chat.jsonl").write_text("\n".join(lines) + "\n")
    done = megamask(
        "prepare",
        ROOT / "configs" / "corpus" / "python_stdlib.yaml",
        f"corpus.inputs=[{{path: '{tmp_path}/chat.jsonl', format: messages}}]",
        f"corpus.output_dir={tmp_path}/corpus",
        "corpus.sequence_length=64",
        "corpus.tokenizer.vocab_size=300",
    )
    assert done.code == 0, done.stderr
    train(tmp_path / "corpus", tmp_path, "answers", "data.score=answers", "data.isolate_documents=true")
    found = steps(tmp_path, "answers")
    assert found[-1]["loss"] < found[0]["loss"] / 1.5
    assert found[-1]["consumed_tokens"] < 0.6 * STEPS * 8 * 64
    shown = megamask("inspect", tmp_path / "answers", "--step", "300", "--json").json
    assert shown["matches_journal"] is True
