"""Small config files for tests: a folder with a model layer and a run layer on top of it."""

from __future__ import annotations

from pathlib import Path

MODEL = """\
model:
  num_layers: 2
  hidden_size: 64
  num_attention_heads: 4
  ffn_hidden_size: 128
"""
RUN = """\
defaults:
  - model.yaml
run:
  name: tiny
data:
  corpora:
    main: corpora/main
optimizer:
  learning_rate: 3.0e-3
training:
  steps: 20
  global_batch_size: 8
  sequence_length: 128
"""
PREPARE = """\
corpus:
  inputs: [texts/*.txt]
  output_dir: corpora/main
  sequence_length: 128
  tokenizer:
    vocab_size: 512
"""


def write_configs(folder: Path, **files: str) -> Path:
    """Writes model.yaml, run.yaml and prepare.yaml (or NAME.yaml as given) and returns the path of run.yaml."""
    for name, text in {"model": MODEL, "run": RUN, "prepare": PREPARE, **files}.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder / "run.yaml"
