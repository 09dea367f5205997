"""The commented configs that `megamask new-config` writes: the least that a corpus and a run need."""

from __future__ import annotations

CORPUS = """\
# How text becomes a corpus: megamask prepare corpus.yaml
# Every setting: megamask explain corpus, or docs/settings.md. Paths are relative to the folder where you run megamask.
corpus:
  inputs:
    - texts/*.txt              # files and globs: .txt, .md, .py, ... or .jsonl, .parquet
  output_dir: corpora/main     # must not hold another corpus
  sequence_length: 128         # tokens of a row; a multiple of 16, the same as training.sequence_length
  tokenizer:
    vocab_size: 4096           # trains a byte-level BPE; or load one with `path:` instead
"""
RUN = """\
# A training run: megamask train run.yaml
# The same command resumes. Look before you train: megamask train run.yaml --check
run:
  name: first                  # the run directory is runs/first
  output_dir: runs
  seed: 1                      # initial weights, masks and noise levels

data:
  corpora:
    main: corpora/main         # what megamask prepare wrote

model:                         # identity: it never changes within a run
  num_layers: 4
  hidden_size: 128
  num_attention_heads: 4
  ffn_hidden_size: 384

optimizer:
  learning_rate: 3.0e-3
  warmup_steps: 30
  decay_steps: 100             # the last steps, over which the rate falls linearly
  min_learning_rate: 1.0e-4

training:
  steps: 500                   # may be raised until the rate begins to fall: the run continues
  global_batch_size: 16        # rows of one optimizer step, all processes together
  micro_batch_size: 8          # rows of one forward pass; changes memory and speed only
  sequence_length: 128

layout:                        # may change with every attempt; the product is the number of processes
  data_parallel_size: 1

checkpoint:
  every_steps: 100

evaluation:
  every_steps: 100             # the likelihood bound on the held-out rows
"""
FILES = {"corpus.yaml": CORPUS, "run.yaml": RUN}
