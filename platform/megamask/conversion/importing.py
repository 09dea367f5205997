"""Import of a published model as a checkpoint: tensor by tensor, resumable, verified, visible at the end."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megamask.checkpoint.commit import Commit
from megamask.checkpoint.contents import ModelDocument, TrainerState
from megamask.checkpoint.names import COMMIT_NAME, HUB_FOLDER_NAME, TOKENIZER_NAME
from megamask.checkpoint.origin import Origin, publish_without_run
from megamask.conversion.hub_folder import CONFIG_NAME, GENERATION_NAME, HubFolder
from megamask.conversion.name_map import NameMap
from megamask.conversion.partial_folder import Progress, partial_folder, refuse_existing, show
from megamask.conversion.published_tokens import IdSource, published_tokenizer, special_ids, vocabulary_of
from megamask.data.tokenizer import CorpusTokenizer
from megamask.engine.state.restore import canonical_reader
from megamask.engine.state.weights_file import MAX_FILE_BYTES, plan_files, write_weights
from megamask.errors import DataIntegrityError
from megamask.models.families.base import Family, TokenIds
from megamask.models.families.registry import family_of
from megamask.models.shapes import canonical_shapes
from megamask.models.vocabulary import Vocabulary
from megamask.objectives.base import Objective
from megamask.objectives.registry import build_objective
from megamask.objectives.shifted import SHIFT_KEY
from megamask.storage.hashing import hash_of, sha256_bytes


@dataclass(frozen=True, kw_only=True)
class PublishedModel:
    """A folder in Hugging Face layout, read and checked, but for the weights themselves.

    Args:
        dtypes: published name -> number format, as safetensors names it.
        tokenizer: None where there is none, or none that this program runs (`tokenizer_problem` has the reason).
    """

    folder: HubFolder
    names: NameMap
    ids: TokenIds
    vocabulary: Vocabulary
    objective: Objective
    block_size: int | None
    dtypes: Mapping[str, str]
    tokenizer: CorpusTokenizer | None
    tokenizer_problem: str | None

    @property
    def family(self) -> Family:
        """The family."""
        return self.names.family

    def canonical(self, name: str) -> torch.Tensor:
        """A canonical tensor's value in float32."""
        return self.names.tensor(self.folder, name).float()

    def fingerprint(self) -> str:
        """H of what identifies the folder: its config, and names, sizes and headers of its weight files."""
        files = [[path.name, path.stat().st_size, sha256_bytes(_header(path))] for path in self.folder.weight_files()]
        return hash_of(sha256_bytes((self.folder.path / CONFIG_NAME).read_bytes()), *files)

    def origin(self) -> Origin:
        """Record of the model in the checkpoint."""
        family = self.family
        (most, _), *_ = Counter(self.dtypes.values()).most_common(1)
        return Origin(
            kind="imported",
            family=family.name,
            architecture=str(self.folder.config["architectures"][0]),
            attention=family.attention,
            target_shift=family.target_shift,
            block_size=self.block_size,
            ids={kind: token for kind, token in vars(self.ids).items() if token is not None},
            dtype=most,
            other_dtypes={name: dtype for name, dtype in self.dtypes.items() if dtype != most},
            tokenizer_problem=self.tokenizer_problem,
            has_merged_experts=self.names.has_merged_experts,
        )


@dataclass(frozen=True, kw_only=True)
class ImportReport:
    """Result of an import.

    Args:
        num_bytes: bytes of the weights in the checkpoint.
        resumed_files: weight files that an interrupted import had finished.
    """

    commit: Commit
    model: PublishedModel
    tensors: int
    num_bytes: int
    resumed_files: int


def read_published(path: Path, *, prefer_ids: IdSource | None = None) -> PublishedModel:
    """Read everything of a published model but its weights, and check names, shapes and formats of all tensors.

    Raises:
        UsageError: it is not such a folder, the architecture is not supported, or its files contradict one another.
        DataIntegrityError: a document or a weight file is damaged, truncated or missing.
    """
    folder = HubFolder(path)
    family = family_of(folder.config)
    names = NameMap.of_folder(folder, family)
    ids = special_ids(folder, family, prefer=prefer_ids)
    vocabulary, block_size = vocabulary_of(names.spec, ids), family.block_size(folder.config)
    tokenizer, problem = published_tokenizer(folder, vocabulary)
    return PublishedModel(
        folder=folder,
        names=names,
        ids=ids,
        vocabulary=vocabulary,
        objective=published_objective(family, vocabulary, block_size),
        block_size=block_size,
        dtypes={name: folder.dtype(name, shape) for name, shape in names.hub_shapes().items()},
        tokenizer=tokenizer,
        tokenizer_problem=problem,
    )


def published_objective(family: Family, vocabulary: Vocabulary, block_size: int | None) -> Objective:
    """Reading of a row by the weights: the objective that evaluation, sampling and export take them for."""
    shift = {SHIFT_KEY: True} if family.target_shift else {}
    settings: dict[str, Any]
    if family.attention == "causal":
        settings = {"name": "autoregressive", "mask_logit": "included"}
    elif family.attention == "bidirectional":
        settings = {"name": "masked", "noise_schedule": "linear", "complementary": False, "mask_logit": "included"}
        settings |= shift
    else:
        settings = {
            "name": "block",
            "block_size": block_size or 1,
            "clean_half": "block_causal",
            "mask_logit": "included",
        }
        settings |= {"noise_schedule": "linear"} | shift
    return build_objective(settings, vocabulary)


def import_model(
    target: Path,
    model: PublishedModel,
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> ImportReport:
    """Write a published model as a checkpoint without a run.

    The files are made in `<target>.partial`, compared with the source bit for bit, and only then renamed. After an
    interruption the same call continues with the first weight file that is missing. Memory: one tensor, twice.

    Args:
        on_progress: called after each tensor with bytes done and bytes in all, for writing and for verifying.

    Raises:
        UsageError: the target exists; it is not touched.
        DataIntegrityError: the source's bytes cannot be read, or a written tensor does not read back.
        StorageError: the storage refused; the target does not exist.
    """
    refuse_existing(target)
    shapes = canonical_shapes(model.names.spec)
    files = plan_files(shapes, max_file_bytes)
    partial = partial_folder(target, hash_of(_fingerprint(model), [[file, names] for file, names in files.items()]))
    (partial / COMMIT_NAME).unlink(missing_ok=True)
    sizes = {name: 4 * math.prod(shape) for name, shape in shapes.items()}
    progress = Progress(2 * sum(sizes.values()), on_progress)

    def value_of(name: str) -> torch.Tensor:
        progress.add(sizes[name])
        return model.canonical(name)

    resumed = 0
    for file, names in files.items():
        if (partial / file).is_file():
            resumed += 1
            progress.add(sum(sizes[name] for name in names))
            continue
        write_weights(partial / file, names, shapes, value_of)
    _verify(partial, model, shapes, value_of)
    commit = publish_without_run(
        partial,
        list(files),
        origin=model.origin(),
        model=ModelDocument(
            spec=model.names.spec,
            vocabulary=model.vocabulary,
            objective=model.objective,
            tokenizer_digest=None if model.tokenizer is None else model.tokenizer.digest,
        ),
        state=TrainerState(step=0, consumed_samples=0, consumed_tokens=0, seed=0),
        documents=_documents(model),
    )
    show(partial, target)
    commit = dataclasses.replace(commit, folder=target)
    return ImportReport(
        commit=commit, model=model, tensors=len(shapes), num_bytes=sum(sizes.values()), resumed_files=resumed
    )


def _documents(model: PublishedModel) -> dict[str, bytes]:
    """The tokenizer as this program reads it, and the published documents as they are."""
    folder = model.folder
    paths = [folder.path / CONFIG_NAME, folder.path / GENERATION_NAME, *folder.tokenizer_files()]
    documents = {f"{HUB_FOLDER_NAME}/{path.name}": path.read_bytes() for path in paths if path.is_file()}
    if model.tokenizer is not None:
        documents |= {f"{TOKENIZER_NAME}/{name}": data for name, data in model.tokenizer.files().items()}
    return documents


def _verify(
    partial: Path,
    model: PublishedModel,
    shapes: Mapping[str, tuple[int, ...]],
    value_of: Callable[[str], torch.Tensor],
) -> None:
    """Read every tensor back with the reader of a resume and compare it with the source bit for bit."""
    read = canonical_reader(partial, model.names.spec)
    for name in shapes:
        if not torch.equal(read(name).view(torch.int32), value_of(name).view(torch.int32)):
            shutil.rmtree(partial)
            raise DataIntegrityError(
                f"{name} does not read back from {partial} as it was written; the folder was removed.",
                hint="check the storage, then convert again",
            )


def _header(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(min(int.from_bytes(file.read(8), "little"), 1 << 27))


def _fingerprint(model: PublishedModel) -> list[Any]:
    """Identify the source: its documents, and size and time of each weight file."""
    folder = model.folder
    weights = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in folder.weight_files()]
    return [sha256_bytes((folder.path / CONFIG_NAME).read_bytes()), *weights, sorted(model.dtypes.items())]
