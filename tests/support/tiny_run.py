"""A run directory with a committed checkpoint of an untrained tiny model, made without megatron-core."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megamask.checkpoint.commit import Commit
from megamask.checkpoint.contents import ModelDocument, TrainerState
from megamask.checkpoint.saver import save
from megamask.config.load import load_train_config
from megamask.config.schema.corpus import CorpusConfig, TokenizerConfig
from megamask.config.schema.roots import TrainConfig
from megamask.data.corpus.prepare import build
from megamask.data.manifest import Manifest
from megamask.engine.state.share import Share
from megamask.engine.state.slices import StoredSlice, stored_shapes
from megamask.models.initial_weights import initial_tensor
from megamask.models.shapes import canonical_shapes
from megamask.models.spec import ModelSpec
from megamask.models.vocabulary import Vocabulary
from megamask.runs.configs import store_attempt_config
from megamask.runs.record import open_run
from support.objectives import masked_objective
from support.thread_world import ThreadEngine, ThreadWorld

SEQUENCE_LENGTH = 32
SEED = 2**40 + 9
WORDS = ("alpha", "beta", "gamma", "delta", "h\u00e9\u00e9")
CONFIG = """
run: {{name: run, output_dir: "{folder}", seed: {seed}}}
model: {{num_layers: 2, hidden_size: 32, num_attention_heads: 2, ffn_hidden_size: 64}}
data: {{corpora: {{main: "{corpus}"}}}}
optimizer: {{learning_rate: 0.001}}
training: {{steps: {step}, global_batch_size: 4, sequence_length: {length}}}
"""


def write_corpus(
    folder: Path,
    *,
    words: Sequence[str] = WORDS,
    sequence_length: int = SEQUENCE_LENGTH,
    documents: int = 30,
    lengths: tuple[int, int] = (20, 80),
    vocab_size: int = 270,
    **settings: Any,
) -> Path:
    """Prepare a corpus of random words, with a validation split; the one builder of small corpora in tests.

    Args:
        documents: texts to write. lengths: range of their numbers of words.
        settings: further keys of the section corpus.
    """
    (folder / "texts").mkdir(parents=True)
    generator = random.Random(3)
    for number in range(documents):
        text = " ".join(generator.choice(words) for _ in range(generator.randrange(*lengths)))
        (folder / "texts" / f"{number:02}.txt").write_text(text, encoding="utf-8")
    config = CorpusConfig(
        inputs=[str(folder / "texts" / "*.txt")],
        output_dir=str(folder / "corpus"),
        sequence_length=sequence_length,
        tokenizer=TokenizerConfig(vocab_size=vocab_size),
        **{"validation_fraction": 0.3, "rows_per_block": 4, **settings},
    )
    build(config)
    return folder / "corpus"


class InitialWeights(ThreadEngine):
    """One process that saves a network's initial weights, in the engine's own format."""

    spec: ModelSpec

    def state_share(self, *, copy: bool) -> Share:  # type: ignore[override]
        slices = [
            StoredSlice(name=name, shape=shape, offsets=(0,) * len(shape), data=self._value(name, shape))
            for name, shape in stored_shapes(self.spec).items()
        ]
        return Share(slices, stored_shapes(self.spec), num_updates=0, rank=0)

    def _value(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A weight's initial value; zeros for Adam's moments."""
        is_weight = name in canonical_shapes(self.spec)
        return initial_tensor(SEED, name, self.spec) if is_weight else torch.zeros(shape)


def write_run(folder: Path, corpus: Path, *, step: int = 20, earlier_steps: Sequence[int] = ()) -> tuple[Path, Commit]:
    """A run directory on that corpus, with one checkpoint, and those of earlier steps if they are asked for."""
    manifest = Manifest.load(corpus)
    text = CONFIG.format(folder=folder, corpus=corpus, seed=SEED, step=step, length=manifest.sequence_length)
    (folder / "config.yaml").write_text(text)
    config = load_train_config(folder / "config.yaml", []).config
    run_dir = folder / "run"
    corpora = {"main": manifest.corpus_id}
    record = open_run(run_dir, config, corpora=corpora, tokenizer_digest=manifest.tokenizer_digest, code_version="test")
    store_attempt_config(run_dir, 1, config)
    for earlier in earlier_steps:
        _commit(run_dir, config, manifest, corpus, record.run_id, earlier)
    return run_dir, _commit(run_dir, config, manifest, corpus, record.run_id, step)


def _commit(run_dir: Path, config: TrainConfig, manifest: Manifest, corpus: Path, run_id: str, step: int) -> Commit:
    spec = ModelSpec.from_config(config.model, manifest.vocab_size, manifest.sequence_length)
    vocabulary = Vocabulary(
        vocab_size=manifest.vocab_size,
        padded_vocab_size=spec.padded_vocab_size,
        mask_token_id=manifest.mask_token_id,
        eod_token_id=manifest.eod_token_id,
        pad_token_id=manifest.pad_token_id,
    )
    engine = InitialWeights(ThreadWorld(1), 0)
    engine.spec = spec
    return save(
        engine,
        run_dir,
        attempt=1,
        state=TrainerState(step=step, consumed_samples=4 * step, consumed_tokens=100 * step, seed=SEED),
        model=ModelDocument(
            spec=spec,
            vocabulary=vocabulary,
            objective=masked_objective(vocabulary),
            tokenizer_digest=manifest.tokenizer_digest,
        ),
        tokenizer_folder=corpus / "tokenizer",
        corpora={"main": manifest.corpus_id},
        journal_head=(3, "0" * 64),
        run_id=run_id,
        parent=None,
        check_claim=lambda: None,
    )
