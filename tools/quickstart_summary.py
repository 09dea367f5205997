"""Held-out bits per byte of a run beside two baselines on the same bytes: unigram tokens and gzip.

    megamask evaluate RUN --split validation --json > evaluation.json
    python tools/quickstart_summary.py --corpus corpora/python_stdlib --evaluation evaluation.json \\
      --config configs/run/quickstart.yaml

The model's figure is an upper bound (the negative ELBO); the baselines are exact code lengths. The unigram model is
fitted on the training split with add-one smoothing; gzip compresses exactly the text of the scored rows.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import sys
from pathlib import Path

import numpy as np

from megamask.config.load import load_train_config
from megamask.data.manifest import Manifest
from megamask.data.reader import SplitReader
from megamask.data.tokenizer import CorpusTokenizer


def split_tokens(corpus: Path, split: str, num_rows: int | None) -> np.ndarray:
    """The eligible tokens of the first rows of a split, in order."""
    manifest = Manifest.load(corpus)
    reader = SplitReader(corpus, manifest, split)
    count = reader.num_rows if num_rows is None else min(num_rows, reader.num_rows)
    tokens = np.concatenate([reader.read(row).tokens for row in range(count)]).astype(np.int64)
    reader.close()
    return tokens[tokens != manifest.pad_token_id]


def unigram_nats_per_token(train: np.ndarray, held_out: np.ndarray, vocab_size: int) -> float:
    """Cross entropy of held-out tokens under training frequencies, add-one smoothed."""
    counts = np.bincount(train, minlength=vocab_size) + 1.0
    return float(-np.log(counts / counts.sum())[held_out].mean())


def main() -> int:
    """Print the table; exit code 1 if the model does not beat the unigram baseline by two standard errors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, required=True, help="output of megamask evaluate --json")
    parser.add_argument("--config", type=Path, required=True, help="config that the run was trained with")
    arguments = parser.parse_args()
    answer = json.loads(arguments.evaluation.read_text(encoding="utf-8").splitlines()[-1])

    tokenizer = CorpusTokenizer.load(arguments.corpus / "tokenizer")
    held_out = split_tokens(arguments.corpus, "validation", answer["num_samples"])
    text = tokenizer.decode_bytes(held_out[held_out != tokenizer.eod_token_id].tolist())
    unigram = unigram_nats_per_token(
        split_tokens(arguments.corpus, "train", None), held_out, Manifest.load(arguments.corpus).vocab_size
    )
    if len(text) != answer["num_bytes"] or len(held_out) != answer["num_tokens"]:
        sys.exit(f"the evaluation scored {answer['num_bytes']} bytes, not these {len(text)}: is it of this corpus?")
    bits = len(held_out) / (math.log(2) * len(text))
    bound, error = answer["nelbo_nats_per_token"], answer["standard_error"]
    print(f"held-out text: {len(text)} bytes, {len(held_out)} tokens")
    print(f"{'':24}{'bits per byte':>14}{'nats per token':>16}")
    print(f"{'megamask (upper bound)':24}{bound * bits:14.3f}{bound:16.3f}  (standard error {error:.3f})")
    print(f"{'unigram tokens':24}{unigram * bits:14.3f}{unigram:16.3f}")
    print(f"{'gzip -9':24}{8 * len(gzip.compress(text, 9)) / len(text):14.3f}")
    rows_in_training = load_train_config(arguments.config).config.evaluation.rows
    if rows_in_training < answer["num_samples"]:
        rows, step = answer["num_samples"], answer["step"]
        print(f"\nThis bound is measured on {rows} held-out rows. The evaluations during training use")
        print(f"the first {rows_in_training} of them (evaluation.rows), so their figure for step {step}, in the log")
        print("above and in MLflow, differs from this one.")
    return 0 if bound + 2 * error < unigram else 1


if __name__ == "__main__":
    sys.exit(main())
