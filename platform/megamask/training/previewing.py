"""Texts that the network writes during training: prompts of the config, continued on the engine.

A preview decodes as `megamask sample` does, with the engine's forward pass in place of the reference network's: under
the run's own layout, without gathering weights or logits. Its rows are as long as training's: after the prompt come the
masks to fill, and masks that stay. The sampling noise of a prompt is the same at every step, so that what changes from
preview to preview is the network.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megamask.config.schema.roots import TrainConfig
from megamask.data.loader import Loader
from megamask.diffusion.sampling import MAX_ELEMENTS, Draw, Prediction
from megamask.errors import UsageError
from megamask.generation.confidence import DecodingOptions, check_decoding, decode
from megamask.generation.prompt import TextTokenizer, until_end
from megamask.objectives.base import Objective, Reading
from megamask.objectives.in_force import at_step, each_in_force
from megamask.storage.fault_points import reached
from megamask.storage.hashing import hash_of, key_of
from megamask.training.hooks import Recorder
from megamask.training.metrics import StepRecord
from megamask.training.progress import Progress
from megamask.training.stopping import CutShort, StopReason

if TYPE_CHECKING:
    from megamask.engine.engine import Engine

_SHOWN_CHARACTERS = 40


@dataclass(frozen=True, kw_only=True)
class PreviewRows:
    """The prompts as rows with masks.

    Args:
        tokens: [n, s] int64. starts: [n] where each answer begins.
        seed: of the sampling noise; a prompt's place is its number under that seed.
    """

    prompts: list[str]
    tokens: Tensor
    starts: list[int]
    num_tokens: int
    seed: int
    tokenizer: TextTokenizer
    eod_token_id: int

    @property
    def is_wanted(self) -> Tensor:
        """Bool [n, s]: the positions to fill."""
        place, start = torch.arange(self.tokens.size(1)), torch.tensor(self.starts)[:, None]
        return (place >= start) & (place < start + self.num_tokens)

    def text(self, row: int, ids: list[int]) -> str:
        """Return the text of a filled row after its prompt, up to the first end of document."""
        answer = ids[self.starts[row] : self.starts[row] + self.num_tokens]
        return self.tokenizer.decode(until_end(answer, self.eod_token_id))


def preview_seed(seed: int) -> int:
    """The seed of the sampling noise of a run's previews, from run.seed: 64 bits that no other purpose uses."""
    low, high = key_of(hash_of(seed, "preview"))
    return low + (high << 32)


def open_previews(config: TrainConfig, objective: Objective, corpus: Loader) -> PreviewRows | None:
    """The rows to decode, when previews are asked for.

    Raises:
        UsageError: a prompt does not fit a row together with its answer.
    """
    preview, length, manifest = config.preview, config.training.sequence_length, corpus.manifest
    if preview.every_steps is None:
        return None
    if preview.temperature > 0 and length * manifest.vocab_size >= MAX_ELEMENTS:
        raise UsageError(
            f"preview.temperature is {preview.temperature}, but {length} positions x {manifest.vocab_size} tokens are "
            "more than the noise law numbers; allowed: 0. Nothing was started."
        )
    rows, starts = torch.full((len(preview.prompts), length), manifest.mask_token_id), []
    for number, prompt in enumerate(preview.prompts):
        ids = corpus.tokenizer.encode(prompt) or list(objective.decoder.opening)
        if len(ids) + preview.num_tokens > length:
            raise UsageError(
                f"preview.prompts: {_shown(prompt)} has {len(ids)} tokens, and preview.num_tokens = "
                f"{preview.num_tokens} more do not fit in training.sequence_length = {length}; allowed: prompts of at "
                f"most {length - preview.num_tokens} tokens. Nothing was started.",
                hint="shorten the prompt or lower preview.num_tokens",
            )
        rows[number, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        starts.append(len(ids))
    opened = PreviewRows(
        prompts=preview.prompts,
        tokens=rows,
        starts=starts,
        num_tokens=preview.num_tokens,
        seed=preview_seed(config.run.seed),
        tokenizer=corpus.tokenizer,
        eod_token_id=manifest.eod_token_id,
    )
    try:
        for each in each_in_force(objective):
            check_decoding(each.decoder, opened.tokens, opened.is_wanted, _options(config, opened))
    except UsageError as error:
        raise UsageError(
            f"preview.denoising_steps is {preview.denoising_steps}, with which objective.name={objective.name} cannot "
            f"write preview.num_tokens = {preview.num_tokens} tokens: {error.message.partition('. Nothing')[0]}. "
            "Nothing was started.",
            hint="set preview.denoising_steps=null",
        ) from error
    return opened


def preview_on_engine(
    config: TrainConfig,
    engine: Engine,
    objective: Objective,
    rows: PreviewRows,
    check: Callable[[], None] = lambda: None,
    step: Callable[[], int] = lambda: 0,
) -> Callable[[], Mapping[str, Any] | None]:
    """Return a function that lets the network write; collective, the same answer on every rank.

    Prompt i is decoded by data-parallel coordinate i mod their number. All prompts take the same number of steps, and
    between two steps the coordinates meet to see whether the attempt must end.

    Args:
        check: collective; raises CutShort on every rank, then the function returns None.
        step: steps taken when the function is called: a target shift may end on the way.
    """
    preview = config.preview
    mesh = engine.mesh
    mine = list(range(mesh.data_parallel_rank, len(rows.prompts), mesh.data_parallel_size))

    def measure() -> dict[str, Any] | None:
        """Decode every prompt under the network's present weights."""
        started = time.monotonic()
        try:
            decoded = _decode_some(config, engine, at_step(objective, step()), rows, mine, check)
        except CutShort:
            return None
        for part in engine.gather_objects(decoded):
            decoded |= part
        return {
            "samples": [
                {
                    "prompt": prompt,
                    "text": rows.text(row, decoded[row][0]),
                    "num_tokens": rows.num_tokens,
                    "nfe": decoded[row][1],
                    "sequence": row,
                }
                for row, prompt in enumerate(rows.prompts)
            ],
            "denoising_steps": preview.denoising_steps or rows.num_tokens,
            "temperature": preview.temperature,
            "seed": rows.seed,
            "seconds": {"preview": round(time.monotonic() - started, 6)},
        }

    return measure


def _decode_some(
    config: TrainConfig,
    engine: Engine,
    objective: Objective,
    rows: PreviewRows,
    mine: list[int],
    check: Callable[[], None],
) -> dict[int, tuple[list[int], int]]:
    """Return the ids and the NFE of this coordinate's rows, by row; a coordinate without rows only checks."""

    def predict(reading: Reading, draw: Draw) -> Prediction:
        check()
        reached("preview.pass_begun")
        return engine.predict(reading, draw)

    if not mine:
        for _ in range(config.preview.denoising_steps or rows.num_tokens):
            check()
        return {}
    found = decode(
        predict,
        objective.decoder,
        rows.tokens[mine],
        is_wanted=rows.is_wanted[mine],
        options=_options(config, rows),
        sequences=mine,
    )
    return {row: (one.tokens.tolist(), one.nfe) for row, one in zip(mine, found, strict=True)}


class PeriodicPreview:
    """Lets the network write every n steps.

    Args:
        measure: decodes on every rank together and returns the journal's fields, or None if it was cut short; None
            means never.
        has_line: whether the journal has a `sample_preview` line of a step, on every rank alike.
    """

    section = "preview"

    def __init__(
        self,
        recorder: Recorder,
        every_steps: int | None,
        measure: Callable[[], Mapping[str, Any] | None] | None,
        has_line: Callable[[int], bool] = lambda step: True,
    ) -> None:
        self._recorder = recorder
        self._every = every_steps
        self._measure = measure
        self._has_line = has_line

    def on_start(self, progress: Progress) -> None:
        """The `sample_preview` line of the step that the attempt resumes at, if the attempt before left it out."""
        if progress.step and self._is_due(progress.step) and not self._has_line(progress.step):
            self._write(progress.step)

    def after_step(self, progress: Progress, record: StepRecord) -> None:
        """A `sample_preview` line when it is due."""
        if self._is_due(progress.step):
            self._write(progress.step)

    def _is_due(self, step: int) -> bool:
        return self._measure is not None and self._every is not None and step % self._every == 0

    def _write(self, step: int) -> None:
        fields = None if self._measure is None else self._measure()
        reached("preview.decoded")
        if fields is not None:
            self._recorder.append("sample_preview", step=step, **fields)

    def on_stop(self, progress: Progress, reason: StopReason) -> None:
        """Nothing: previews are due by step only, so that a restart changes no record."""


def _options(config: TrainConfig, rows: PreviewRows) -> DecodingOptions:
    preview = config.preview
    return DecodingOptions(num_denoising_steps=preview.denoising_steps, temperature=preview.temperature, seed=rows.seed)


def _shown(prompt: str) -> str:
    return repr(prompt if len(prompt) <= _SHOWN_CHARACTERS else prompt[:_SHOWN_CHARACTERS] + "...")
