"""The files in which tokenizers are published, read into the form of tokenizer.json.

    folder            tokenizer.json; or vocab.json + merges.txt; or encoder.json + vocab.bpe; or a .model or .tiktoken
    tokenizer.json    as it is
    vocab or merges   GPT-2's pair of files, found beside each other
    .model            sentencepiece (or tiktoken's lines, as Llama 3 names its file)
    .tiktoken         base64 of a token and its rank on each line; the pattern that cuts text is not in the file

The tokenizer's own end-of-sentence token is taken from the sentencepiece model, or from tokenizer_config.json or
special_tokens_map.json beside the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamask.data.tokenizer.refusal import refuse
from megamask.errors import UsageError
from megamask.storage.hashing import sha256_bytes

_PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")
_KEY = "corpus.tokenizer.path"


@dataclass(frozen=True, kw_only=True)
class Source:
    """A published tokenizer.

    Args:
        kind: tokenizer_json, gpt2, sentencepiece or tiktoken.
        files: sha256 of each file that it was read from, by name.
        data: in the form of tokenizer.json.
        eos: its own end-of-sentence token, if it is known.
        library, encode: the library that the files belong to, and the ids that it gives; None where that is the one
            that reads tokenizer.json.
    """

    kind: str
    files: Mapping[str, str]
    data: dict[str, Any]
    eos: str | None = None
    library: str = "tokenizers"
    encode: Callable[[str], list[int]] | None = None


def load_source(path: Path, pattern: str | None) -> Source:
    """Read a published tokenizer.

    Args:
        path: a folder or a file, see above.
        pattern: how text is cut before a tiktoken file's merges: a name or a regular expression.

    Raises:
        UsageError: it is missing or not supported; the message names what to give.
    """
    path = path.expanduser()
    file = _file_in(path) if path.is_dir() else path
    content = _read(file)
    if content[:1] == b"{" or file.suffix == ".json":
        data = parse(content, str(file), any_object=True)
        if isinstance(data.get("model"), dict):
            source = Source(kind="tokenizer_json", files={file.name: sha256_bytes(content)}, data=data)
        elif data and all(isinstance(value, int) for value in data.values()):
            source = _gpt2(file)
        else:
            raise refuse(str(file), "not a tokenizer.json")
    elif file.name in {name for pair in _PAIRS for name in pair}:
        source = _gpt2(file)
    elif _TIKTOKEN_LINE.match(content):
        from megamask.data.tokenizer.tiktoken_file import read_tiktoken

        source = read_tiktoken(file, content, pattern)
    elif file.suffix == ".model":
        from megamask.data.tokenizer.sentencepiece_model import read_sentencepiece

        source = read_sentencepiece(file, content)
    else:
        raise refuse(str(file), "not JSON, not a sentencepiece model and not a tiktoken file")
    if pattern is not None and source.kind != "tiktoken":
        raise UsageError(
            f"corpus.tokenizer.pattern is set, but {path} is not a tiktoken file and has a pattern of its own. "
            "Nothing was written.",
            hint="set corpus.tokenizer.pattern=null",
        )
    return source if source.eos is not None else _with_eos(source, file.parent)


def parse(data: bytes, name: str, *, any_object: bool = False) -> dict[str, Any]:
    """Return the content of a tokenizer.json.

    Args:
        any_object: another JSON object is returned as well.

    Raises:
        UsageError: it is something else.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise refuse(name, f"not JSON ({error})") from error
    if not isinstance(value, dict) or not (any_object or isinstance(value.get("model"), dict)):
        raise refuse(name, "not a tokenizer.json")
    return value


def _file_in(folder: Path) -> Path:
    if (file := folder / "tokenizer.json").is_file():
        return file
    for vocab, merges in _PAIRS:
        if (folder / vocab).is_file() and (folder / merges).is_file():
            return folder / vocab
    found = sorted([*folder.glob("*.model"), *folder.glob("*.tiktoken")])
    if len(found) == 1:
        return found[0]
    raise UsageError(
        f"{_KEY}: the folder {folder} holds {len(found) or 'no'} tokenizer files; needed: tokenizer.json, or "
        "vocab.json and merges.txt, or encoder.json and vocab.bpe, or one .model or .tiktoken file. "
        "Nothing was written.",
        hint=f"name the file in {_KEY}",
    )


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UsageError(
            f"{_KEY}: {file} cannot be read ({error.strerror}). Nothing was written.",
            hint="name a tokenizer file, or the folder of a published tokenizer",
        ) from error


def _gpt2(file: Path) -> Source:
    """GPT-2's pair of files: entries with ids, and merges in order."""
    for vocab_name, merges_name in _PAIRS:
        if file.name in (vocab_name, merges_name):
            break
    else:
        vocab_name, merges_name = file.name, "merges.txt"
    contents = {name: _read(file.parent / name) for name in (vocab_name, merges_name)}
    vocab = parse(contents[vocab_name], vocab_name, any_object=True)
    lines = contents[merges_name].decode(errors="replace").splitlines()
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    made = {"".join(merge) for merge in merges}
    # an entry that is neither a byte nor a merge can only be a special token
    special = [entry for entry in vocab if len(entry) > 1 and entry not in made]
    files = {name: sha256_bytes(content) for name, content in contents.items()}
    pre_tokenizer = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    data = byte_level_json(vocab, merges, special, pre_tokenizer)
    eos = "<|endoftext|>" if "<|endoftext|>" in special else None
    return Source(kind="gpt2", files=files, data=data, eos=eos)


def byte_level_json(
    vocab: Mapping[str, int],
    merges: list[list[str]],
    special: list[str],
    pre_tokenizer: Any,
    *,
    ignore_merges: bool = False,
) -> dict[str, Any]:
    """Return a byte-level BPE in the form of tokenizer.json."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(vocab[entry], entry, is_special=True) for entry in special],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "ignore_merges": ignore_merges, "vocab": dict(vocab), "merges": merges},
    }


def added_token(number: int, content: str, *, is_special: bool) -> dict[str, Any]:
    """Return an entry of added_tokens; one that is not special is what text of that content turns into."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, **flags, "special": is_special}


def _with_eos(source: Source, folder: Path) -> Source:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            value = json.loads((folder / name).read_bytes()).get("eos_token")
        except (OSError, ValueError, AttributeError):
            continue
        eos = value.get("content") if isinstance(value, dict) else value
        if isinstance(eos, str):
            return Source(**{**vars(source), "eos": eos})
    return source
