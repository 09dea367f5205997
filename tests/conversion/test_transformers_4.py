"""Exports in an older transformers: its own environment, given by $MEGAMASK_TRANSFORMERS_4 or made with pip."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from megamask.conversion.importing import import_model, read_published
from megamask.models.families.registry import FAMILIES as REGISTRY
from megamask_pipelines.convert import to_hub
from support.hub_models import full_logits, save_hub_folder, twin_of

pytestmark = pytest.mark.slow

PACKAGES = ("transformers==4.57.3", "huggingface-hub==0.36.0", "tokenizers==0.22.1")
FAMILIES = [name for name, family in REGISTRY.items() if family.plain_twin or family.attention == "causal"]
PROGRAM = """
import json, sys, torch, transformers
tokens = torch.tensor(json.loads(sys.argv[2]))
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
mask = torch.zeros(len(tokens), 1, tokens.size(1), tokens.size(1))
with torch.no_grad():
    logits = model(input_ids=tokens, attention_mask=mask).logits
print(json.dumps([transformers.__version__, logits.tolist()]))
"""


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with transformers 4.57 and what differs with it; the rest comes from this environment."""
    if given := os.environ.get("MEGAMASK_TRANSFORMERS_4"):
        return Path(given)
    folder = tmp_path_factory.mktemp("transformers4")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, *PACKAGES]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        warnings.warn(f"transformers 4.57 could not be installed: {done.stderr[-300:]}", stacklevel=1)
        pytest.skip("transformers 4.57 could not be installed, so nothing here was tested")
    return folder


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.promise("An export loads in transformers 4.57 too, in its plain layout, with equal logits")
def test_an_export_gives_the_same_logits(tmp_path: Path, packages: Path, family: str) -> None:
    expected = save_hub_folder(tmp_path / "in", family)
    import_model(tmp_path / "checkpoint", read_published(tmp_path / "in"))
    to_hub(tmp_path / "checkpoint", tmp_path / "out", family_name=twin_of(family), number_format="f32")
    tokens = torch.randint(0, 100, (1, 16), generator=torch.Generator().manual_seed(0))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path / "out", json.dumps(tokens.tolist())],
        env=os.environ | {"PYTHONPATH": str(packages)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    version, logits = json.loads(done.stdout.splitlines()[-1])
    assert version.startswith("4.57")
    difference = (torch.tensor(logits) - full_logits(expected, tokens)).abs().max()
    assert difference < 1e-5 * full_logits(expected, tokens).abs().max()
