"""Data of a training job: its corpora, opened and checked before the run is claimed."""

from __future__ import annotations

import contextlib

from megamask.config.schema.roots import TrainConfig
from megamask.data.loader import Loader
from megamask.data.tokenizer import TOKENIZER_DIR, verify_files
from megamask.models.spec import ModelSpec
from megamask.models.vocabulary import Vocabulary
from megamask.objectives.schedule import Phases, phases_of
from megamask.runs.layout import run_path
from megamask.training.batch_size import first_step
from megamask.training.evaluating import open_validation
from megamask.training.mixing import refuse_repetition
from megamask.training.previewing import open_previews
from megamask.training.starting import open_start, run_objective


def objective_phases(config: TrainConfig) -> Phases:
    """The phases of a run's objective; needs no corpus."""
    return phases_of(
        config.objective.settings(isolate_documents=config.data.isolate_documents),
        config.training.sequence_length,
        lambda amount, unit: first_step(amount, unit, config.training),
    )


class RunData:
    """The open corpora of a run, and what the model must know of them."""

    def __init__(self, config: TrainConfig, stack: contextlib.ExitStack) -> None:
        self.train = stack.enter_context(
            contextlib.closing(Loader(config.data.corpora, config.data, config.training.sequence_length))
        )
        self.validation = open_validation(config)
        if self.validation is not None:
            stack.enter_context(contextlib.closing(self.validation))
        refuse_repetition(config, self.train)
        manifest = self.train.manifest
        self.spec = ModelSpec.from_config(config.model, manifest.vocab_size, config.training.sequence_length)
        self.vocabulary = Vocabulary(
            vocab_size=manifest.vocab_size,
            padded_vocab_size=self.spec.padded_vocab_size,
            mask_token_id=manifest.mask_token_id,
            eod_token_id=manifest.eod_token_id,
            pad_token_id=manifest.pad_token_id,
        )
        self.tokenizer_digest = manifest.tokenizer_digest
        self.tokenizer_folder = self.train.folder / TOKENIZER_DIR
        verify_files(self.tokenizer_folder, manifest.tokenizer_digest)  # every checkpoint will hold a copy
        self.start = None
        if config.initialise.source is not None:
            self.start = open_start(
                config.initialise.source,
                config.initialise,
                spec=self.spec,
                vocabulary=self.vocabulary,
                tokenizer=self.train.tokenizer,
                run_dir=run_path(config.run.output_dir, config.run.name),
            )
        self.objective = run_objective(
            objective_phases(config),
            config.initialise,
            source_shifts=self.start is not None and self.start.source_shifts,
            vocabulary=self.vocabulary,
            information=self.train.token_information,
        )
        self.previews = open_previews(config, self.objective, self.train)
        splits = [source.manifest.split("train") for source in self.train.sources.values()]
        self.bytes_per_token = sum(split.text_bytes for split in splits) / sum(split.num_tokens for split in splits)
