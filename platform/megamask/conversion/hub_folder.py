"""A folder in Hugging Face layout, read tensor by tensor: config.json, safetensors shards, the tokenizer's files.

Nothing is unpickled and no remote code is run. Memory is bounded by the largest tensor.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megamask.errors import DataIntegrityError, UsageError
from megamask.storage.durable import read_errors

CONFIG_NAME = "config.json"
GENERATION_NAME = "generation_config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
TOKENIZER_NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)

_MAX_DOCUMENT_BYTES = 1 << 28
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_DERIVED_SUFFIXES = (".rotary_emb.inv_freq",)  # old Llama files store the rotary frequencies, which follow from theta


class HubFolder:
    """The weights and documents of one published model.

    Args:
        path: the folder.

    Raises:
        UsageError: it is not a folder with config.json and safetensors files.
        DataIntegrityError: a document in it is damaged, or a shard is missing or truncated.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise UsageError(f"{path} is not a folder; needed: a model in Hugging Face layout. Nothing was converted.")
        if not (path / CONFIG_NAME).is_file():
            raise UsageError(f"{path} has no {CONFIG_NAME}, so it is not a model folder. Nothing was converted.")
        self._open: tuple[str, Any] | None = None  # one file at a time: the tensors come shard by shard
        self.config = self._document(CONFIG_NAME)
        self._shard_of = self._locate()

    @property
    def num_bytes(self) -> int:
        """Bytes of all weight files."""
        return sum((self.path / name).stat().st_size for name in set(self._shard_of.values()))

    @cached_property
    def tensor_names(self) -> frozenset[str]:
        """Names of the stored tensors; those that follow from the config are left out."""
        return frozenset(name for name in self._shard_of if not name.endswith(_DERIVED_SUFFIXES))

    def tokenizer_files(self) -> list[Path]:
        """The tokenizer's and chat template's files that are present."""
        return [self.path / name for name in TOKENIZER_NAMES if (self.path / name).is_file()]

    def generation_config(self) -> dict[str, Any]:
        """generation_config.json, or an empty object."""
        return self.document(GENERATION_NAME)

    def weight_files(self) -> list[Path]:
        """The safetensors files."""
        return [self.path / name for name in sorted(set(self._shard_of.values()))]

    def document(self, name: str) -> dict[str, Any]:
        """A JSON document of the folder, or an empty object where there is none."""
        return self._document(name) if (self.path / name).is_file() else {}

    def dtype(self, name: str, shape: tuple[int, ...]) -> str:
        """Number format of a tensor, as safetensors names it; its shape is checked and its bytes are not read.

        Raises:
            DataIntegrityError: as `tensor`.
        """
        return self._checked(name, shape)[1]

    def check_names(self, expected: Iterable[str], optional: Iterable[str] = ()) -> None:
        """Compare the stored tensors with those that the family has.

        Raises:
            DataIntegrityError: a tensor is missing or not expected; names up to three of each.
        """
        wanted, allowed = set(expected), set(optional)
        missing, extra = sorted(wanted - self.tensor_names), sorted(self.tensor_names - wanted - allowed)
        if missing or extra:
            parts = [
                f"{len(names)} tensors {what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
                for names, what in ((missing, "are missing"), (extra, "are not part of this architecture"))
                if names
            ]
            raise DataIntegrityError(f"{self.path}: {'; '.join(parts)}. Nothing was converted.")

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """One tensor in its stored number format, on the CPU.

        Raises:
            DataIntegrityError: its shape or number format is another, or its bytes cannot be read.
        """
        value: torch.Tensor = self.rectangle(name, shape, tuple(slice(0, size) for size in shape))
        return value

    def rectangle(self, name: str, shape: tuple[int, ...], index: tuple[slice, ...]) -> torch.Tensor:
        """A part of a tensor in its stored number format, on the CPU; only its bytes are read. Raises as `tensor`."""
        stored, _ = self._checked(name, shape)
        try:
            value: torch.Tensor = stored[index]
        except (SafetensorError, OSError, ValueError) as error:
            raise self._damaged(self._shard_of[name], str(error)) from error
        return value

    def _checked(self, name: str, shape: tuple[int, ...]) -> tuple[Any, str]:
        """The library's handle of a tensor, and its number format."""
        file_name = self._shard_of[name]
        try:
            stored = self._file(file_name).get_slice(name)
            found, kind = tuple(stored.get_shape()), str(stored.get_dtype())
        except (SafetensorError, OSError, ValueError) as error:
            raise self._damaged(file_name, str(error)) from error
        if found != tuple(shape):
            raise self._damaged(file_name, f"{name} has shape {list(found)}, config.json asks for {list(shape)}")
        if kind not in _DTYPES:
            raise self._damaged(file_name, f"{name} is stored as {kind}; supported: {', '.join(_DTYPES)}")
        return stored, kind

    def tensors(self, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensors of these names and shapes, shard by shard, so that each file is opened once."""
        for name in sorted(shapes, key=lambda name: self._shard_of[name]):
            yield name, self.tensor(name, shapes[name])

    def _file(self, name: str) -> Any:
        if self._open is None or self._open[0] != name:
            self._open = (name, safe_open(str(self.path / name), framework="pt", device="cpu"))
        return self._open[1]

    def _locate(self) -> dict[str, str]:
        """Tensor name -> file name. The header of every file is read, so a truncated one is found at once."""
        if (self.path / INDEX_NAME).is_file():
            listed = self._document(INDEX_NAME).get("weight_map")
            if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
                raise self._damaged(INDEX_NAME, "it has no weight_map from names to files")
            names = sorted(set(listed.values()))
        elif (self.path / WEIGHTS_NAME).is_file():
            listed, names = None, [WEIGHTS_NAME]
        else:
            pickles = sorted(path.name for path in self.path.glob("*.bin"))
            raise UsageError(
                f"{self.path} has neither {WEIGHTS_NAME} nor {INDEX_NAME}"
                f"{f', only {pickles[0]}, which is a pickle and is not read' if pickles else ''}. "
                "Nothing was converted.",
                hint="save the model in the safetensors format",
            )
        found: dict[str, str] = {}
        for name in names:
            if PurePosixPath(name).name != name:
                raise self._damaged(INDEX_NAME, f"{name!r} is not the name of a file in this folder")
            if not (self.path / name).is_file():
                raise self._damaged(INDEX_NAME, f"the file {name} is missing")
            try:
                found |= dict.fromkeys(self._file(name).keys(), name)
            except (SafetensorError, OSError, ValueError) as error:
                raise self._damaged(name, f"it is truncated or not a safetensors file ({error})") from error
        if listed is not None and (differing := sorted(set(listed.items()) ^ set(found.items()))):
            raise self._damaged(INDEX_NAME, f"{differing[0][0]} is not where weight_map has it")
        return found

    def _document(self, name: str) -> dict[str, Any]:
        try:
            with read_errors(self.path / name):
                if (size := (self.path / name).stat().st_size) > _MAX_DOCUMENT_BYTES:
                    raise ValueError(f"it has {size} bytes")
                value = json.loads((self.path / name).read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise self._damaged(name, f"not readable as JSON ({error})") from error
        if not isinstance(value, dict):
            raise self._damaged(name, "not a JSON object")
        return value

    def _damaged(self, name: str, what: str) -> DataIntegrityError:
        return DataIntegrityError(
            f"{self.path / name}: {what}. Nothing was converted.", hint="fetch or export the model again"
        )
