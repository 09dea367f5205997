"""Existing weights as the start of a run: a published model or a checkpoint, read slice by slice on any layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from megamask.checkpoint.commit import load_commit
from megamask.checkpoint.contents import read_model, read_state
from megamask.checkpoint.integrity import verify_folder
from megamask.checkpoint.names import TOKENIZER_NAME
from megamask.checkpoint.origin import read_origin
from megamask.checkpoint.reader import candidates, find, has_commit
from megamask.conversion.importing import PublishedModel, read_published
from megamask.conversion.reading import reading_of
from megamask.data.tokenizer import CorpusTokenizer
from megamask.engine.state.safetensors import StateReader
from megamask.engine.state.slices import StoredSlice
from megamask.errors import UsageError
from megamask.models.shapes import EMBEDDING_NAME, HEAD_NAME, canonical_shapes
from megamask.models.spec import ModelSpec
from megamask.models.vocabulary import Vocabulary
from megamask.objectives.base import Objective
from megamask.objectives.in_force import at_step

HUB_PREFIX = "hf:"
_NOTHING = "Nothing was started."
_MAX_NAMED = 5
_ROWS_AT_A_TIME = 4096
_OF_THE_VOCABULARY = (EMBEDDING_NAME, HEAD_NAME)


class WeightReader(Protocol):
    """Reads rectangles of canonical tensors."""

    def read(self, slices: Sequence[StoredSlice]) -> None:
        """Fill the slices' tensors."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Weights that a run can start from.

    Args:
        name: as `initialise.source` has it.
        digest: of the checkpoint's commit, or of a published model's headers and documents.
        family: of a published model; None for a checkpoint.
        objective: how the weights read a row.
        reader: of the weights.
        folder: of a checkpoint, whose bytes can be verified; None for a published model.
        has_corpus_tokenizer: the tokenizer is that of the corpus that the weights were trained on here; a published one
            has special tokens of its own, so that a corpus made with it has another digest.
    """

    name: str
    digest: str
    family: str | None
    spec: ModelSpec
    vocabulary: Vocabulary
    objective: Objective
    tokenizer: CorpusTokenizer | None
    reader: WeightReader
    folder: Path | None
    has_corpus_tokenizer: bool = False

    @property
    def has_shift(self) -> bool:
        """True if the logits at a position predict the token after it."""
        return reading_of(self.objective).has_shift

    def verify(self) -> None:
        """Read every byte of a checkpoint; a published model has no digests to compare with.

        Raises:
            CheckpointIntegrityError: a file is damaged.
        """
        if self.folder is not None:
            verify_folder(self.folder)


class _HubReader:
    """Slices of a published model's tensors; only their bytes are read."""

    def __init__(self, model: PublishedModel) -> None:
        self._model = model

    def read(self, slices: Sequence[StoredSlice]) -> None:
        """Fill the slices' tensors."""
        for each in slices:
            index = tuple(slice(begin, begin + size) for begin, size in zip(each.offsets, each.data.shape, strict=True))
            each.data.copy_(self._model.names.rectangle(self._model.folder, each.name, index))


def open_source(name: str) -> Source:
    """Open what `initialise.source` names; no weight is read yet.

    Raises:
        UsageError: the folder is missing, or not supported. DataIntegrityError: a published model is damaged.
        CheckpointIntegrityError: a checkpoint is damaged.
    """
    if name.startswith(HUB_PREFIX):
        model = read_published(Path(name.removeprefix(HUB_PREFIX)).expanduser())
        return Source(
            name=name,
            digest=model.fingerprint(),
            family=model.family.name,
            spec=model.names.spec,
            vocabulary=model.vocabulary,
            objective=model.objective,
            tokenizer=model.tokenizer,
            reader=_HubReader(model),
            folder=None,
        )
    path = Path(name)
    folder = path if has_commit(path) else next(iter(candidates(path)), None) if path.is_dir() else None
    if folder is None:
        find(path)  # raises, with the reason
        raise UsageError(f"initialise.source is {name}, which has no checkpoint. {_NOTHING}")
    commit, document = load_commit(folder), read_model(folder)
    origin = read_origin(commit)
    return Source(
        name=name,
        digest=commit.digest,
        family=None,
        spec=document.spec,
        vocabulary=document.vocabulary,
        objective=at_step(document.objective, read_state(folder).step),
        tokenizer=None if document.tokenizer_digest is None else CorpusTokenizer.load(folder / TOKENIZER_NAME),
        has_corpus_tokenizer=origin is None or origin.kind == "average",
        reader=StateReader(folder),
        folder=folder,
    )


def check_network(source: Source, spec: ModelSpec) -> None:
    """Refuse a run's network that is not the source's, tensor by tensor; the vocabulary may be of another size.

    Raises:
        UsageError: names the tensors, or the setting that no shape shows.
    """
    theirs = canonical_shapes(source.spec)
    vocab_size, padded = source.spec.vocab_size, source.spec.padded_vocab_size
    ours = canonical_shapes(dataclasses.replace(spec, vocab_size=vocab_size, padded_vocab_size=padded))
    problems = [
        f"{name} is {list(theirs[name])} in the source and {list(ours[name])} here"
        if name in theirs and name in ours
        else f"{name} is only {'in the source' if name in theirs else 'here'}"
        for name in [*ours, *(name for name in theirs if name not in ours)]
        if theirs.get(name) != ours.get(name)
    ]
    problems += [
        f"model.{name} is {getattr(source.spec, name)!r} in the source and {getattr(spec, name)!r} here"
        for name in ("rope_theta", "norm_eps", "rotary_fraction")
        if getattr(source.spec, name) != getattr(spec, name)
    ]
    if source.spec.experts is not None and spec.experts is not None:
        ours_of, theirs_of = spec.experts.to_section(), source.spec.experts.to_section()
        problems += [
            f"model.{name} is {theirs_of[name]!r} in the source and {ours_of[name]!r} here"
            for name in theirs_of
            if theirs_of[name] != ours_of[name]
        ]
    if problems:
        more = f"; and {len(problems) - _MAX_NAMED} more" if len(problems) > _MAX_NAMED else ""
        named = "; ".join(problems[:_MAX_NAMED])
        raise UsageError(
            f"initialise.source is {source.name}, another network: {named}{more}. {_NOTHING}",
            hint="`megamask convert from-hf` prints the section `model` of a published model",
        )


def check_tokenizer(source: Source, tokenizer: CorpusTokenizer, *, allows_other: bool) -> None:
    """Refuse a corpus whose ids do not mean what the source's mean, or whose text becomes other ids.

    Args:
        allows_other: `initialise.allow_other_tokenizer`: a tokenizer that differs only in how text becomes ids passes.

    Raises:
        UsageError: names the first id that differs, the digests, or the sizes where the source has no tokenizer.
    """
    hint = "prepare the corpus with corpus.tokenizer.path set to the source's tokenizer.json"
    if source.tokenizer is None:
        if tokenizer.vocab_size > source.spec.vocab_size + _NUM_SPECIAL:
            raise UsageError(
                f"tokenizer mismatch: the corpus' tokenizer has {tokenizer.vocab_size} entries, the network of "
                f"initialise.source {source.spec.vocab_size}. {_NOTHING}",
                hint=hint,
            )
        return
    for token in range(min(source.tokenizer.vocab_size, tokenizer.vocab_size)):
        theirs, ours = source.tokenizer.decode_bytes([token]), tokenizer.decode_bytes([token])
        if theirs != ours:
            raise UsageError(
                f"tokenizer mismatch: id {token} is {theirs!r} in initialise.source and {ours!r} in the corpus. "
                f"{_NOTHING}",
                hint=hint,
            )
    if source.has_corpus_tokenizer and source.tokenizer.digest != tokenizer.digest and not allows_other:
        raise UsageError(
            f"tokenizer mismatch: initialise.source was trained with tokenizer {source.tokenizer.digest}, the corpus "
            f"has {tokenizer.digest}; ids that both have mean the same, but text may become others. {_NOTHING}",
            hint=f"{hint}; or set initialise.allow_other_tokenizer=true",
        )


_NUM_SPECIAL = 3


@dataclass(frozen=True, kw_only=True)
class MaskRow:
    """First embedding of the mask token.

    Args:
        rule: "kept", the source's row of that very id; "copied", that of another id; "mean" of all rows.
        token_id: of the row that is copied.
    """

    rule: str
    token_id: int | None = None

    def to_text(self) -> str:
        """For records: kept, mean, or the id that is copied."""
        return self.rule if self.token_id is None else str(self.token_id)


def choose_mask_row(setting: str | None, source: Source, mask_token_id: int, tokenizer: CorpusTokenizer) -> MaskRow:
    """Meaning of `initialise.mask_row` for a source and a corpus.

    Raises:
        UsageError: the key must be given, or names an id that the source does not have.
    """
    num_rows, own_mask = source.spec.vocab_size, source.vocabulary.mask_token_id
    if setting is None and own_mask >= 0:
        setting = str(own_mask)
    if setting is None and source.tokenizer is None:
        raise UsageError(
            f"initialise.mask_row is null, and {source.name} has neither a tokenizer that shows unused ids nor a mask "
            f"token of its own; allowed: unused, mean, or an id from 0 to {num_rows - 1}. {_NOTHING}",
            hint="set initialise.mask_row; where unsure, mean",
        )
    if setting == "mean":
        return MaskRow(rule="mean")
    if setting in (None, "unused"):
        if mask_token_id < num_rows:  # a special token of the source that no text becomes
            return MaskRow(rule="kept")
        unused = _unused_ids(tokenizer, num_rows)
        return MaskRow(rule="copied", token_id=unused[-1]) if unused else MaskRow(rule="mean")
    token = int(setting or 0)
    if token >= num_rows:
        raise UsageError(
            f"initialise.mask_row is {token}; allowed: unused, mean, or an id from 0 to {num_rows - 1}. {_NOTHING}"
        )
    return MaskRow(rule="kept") if token == mask_token_id else MaskRow(rule="copied", token_id=token)


def _unused_ids(tokenizer: CorpusTokenizer, num_rows: int) -> list[int]:
    """Ids of the source that the corpus' tokenizer never makes from text; end of document and padding left out."""
    used = {tokenizer.eod_token_id, tokenizer.pad_token_id}
    num_bytes = tokenizer.token_bytes
    return [
        token for token in range(num_rows) if (token >= len(num_bytes) or not num_bytes[token]) and token not in used
    ]


@dataclass(frozen=True, kw_only=True)
class AdaptedWeights:
    """A source's weights for a run's vocabulary: rows that the source lacks, and the mask token's row, are made.

    Rows of the source beyond the run's vocabulary are left out; further rows of the run are the mean of all rows.
    """

    source: Source
    mask_token_id: int
    mask_row: MaskRow

    def read(self, slices: Sequence[StoredSlice]) -> None:
        """Fill slices in the run's shapes."""
        direct = [each for each in slices if each.name not in _OF_THE_VOCABULARY]
        of_vocabulary = [each for each in slices if each.name in _OF_THE_VOCABULARY]
        direct += [known for each in of_vocabulary if (known := self._known_rows(each)) is not None]
        self.source.reader.read(direct)
        for each in of_vocabulary:
            self._make_rows(each)

    def _known_rows(self, each: StoredSlice) -> StoredSlice | None:
        shape = (self.source.spec.vocab_size, each.shape[1])
        count = min(each.offsets[0] + each.data.size(0), shape[0]) - each.offsets[0]
        if count <= 0:
            return None
        return StoredSlice(name=each.name, shape=shape, offsets=each.offsets, data=each.data[:count])

    def _make_rows(self, each: StoredSlice) -> None:
        first, columns = each.offsets[0], slice(each.offsets[1], each.offsets[1] + each.data.size(1))
        for row in self._made_rows(first, first + each.data.size(0)):
            is_mask = row == self.mask_token_id
            token = self.mask_row.token_id if is_mask else None
            value = self._mean(each) if token is None else self._row(each, token)
            each.data[row - first] = value[columns].to(each.data.device)

    def _made_rows(self, first: int, stop: int) -> Iterator[int]:
        for row in range(max(first, self.source.spec.vocab_size), stop):
            if row != self.mask_token_id:
                yield row
        if first <= self.mask_token_id < stop and self.mask_row.rule != "kept":
            yield self.mask_token_id

    def _row(self, each: StoredSlice, token: int, num_rows: int = 1) -> torch.Tensor:
        data = torch.empty(num_rows, each.shape[1])
        shape = (self.source.spec.vocab_size, each.shape[1])
        self.source.reader.read([StoredSlice(name=each.name, shape=shape, offsets=(token, 0), data=data)])
        return data[0] if num_rows == 1 else data

    def _mean(self, each: StoredSlice) -> torch.Tensor:
        total, size = torch.zeros(each.shape[1], dtype=torch.float64), self.source.spec.vocab_size
        for first in range(0, size, _ROWS_AT_A_TIME):
            rows = self._row(each, first, min(_ROWS_AT_A_TIME, size - first))
            total += rows.to(torch.float64).view(-1, each.shape[1]).sum(dim=0)
        return (total / size).to(torch.float32)
