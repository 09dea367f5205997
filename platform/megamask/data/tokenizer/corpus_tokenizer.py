"""A corpus' tokenizer: trained, or loaded from the files of another project; run by tiktoken where that can.

`tokenizer/` of a corpus or a checkpoint holds two files:

    tokenizer.json        the artefact, readable by Hugging Face tokenizers
    special_tokens.json   canonical JSON {format, version, eod: {token, id}, pad: {...}, mask: {...}, vocab_size}

Its digest is H([name, sha256], ...) of the two in name order. Text never becomes a special token: the literal text
`<|mask|>` in a document is encoded like any other text. Text reads back from its ids, with two exceptions that
belong to the tokenizer: NFC where that is its normalizer, and a space before the text where sentencepiece puts one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers

from megamask.data.tokenizer.byte_level_bpe import ByteLevelBpe, build, is_nfc
from megamask.data.tokenizer.pieces import SPACE_MARK, bytes_of_pieces, is_of_pieces, vocabulary
from megamask.data.tokenizer.refusal import refuse
from megamask.data.tokenizer.sources import Source, load_source, parse
from megamask.data.tokenizer.special_tokens import NUM_SPECIAL, SPECIAL_TOKENS, SpecialTokens
from megamask.data.tokenizer.train_bpe import train_byte_level_bpe
from megamask.errors import DataIntegrityError, UsageError
from megamask.storage.documents import decode_document, encode_document
from megamask.storage.durable import storage_errors, write_atomic
from megamask.storage.hashing import hash_of, sha256_bytes
from megamask.storage.plain_files import NotPlainError, read_plain

TOKENIZER_DIR = "tokenizer"
TOKENIZER_NAME = "tokenizer.json"
SPECIAL_TOKENS_NAME = "special_tokens.json"

NO_TOKEN = -1  # id of a special token that a tokenizer lacks; NO_ID of models/vocabulary.py
_BYTES = 256
_MAX_BYTES = 1 << 28
_LONG_SPACES = 200_000
_LONG_SPACE = re.compile(rf"\s{{{_LONG_SPACES}}}")
NASTY_TEXTS = (
    "",
    "\x00\x01\x7f",
    "\ufeffa byte order mark",
    "line\r\nline\rline\n\n\n  \t indented   ",
    "a" * 5000,
    " " * 3000 + "x",
    "\u200f\u05e2\u05d1\u05e8\u05d9\u05ea\u200e mixed with \u202eright-to-left\u202c",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d\U0001f308 \U0001f44d\U0001f3fd e\u0301 \u00e9",
    "\U0010ffff \uffff \ufdd0 \u2028\u2029\u0085\u00a0\u3000",
    "it's they'll I'VE 'Sdon't '' 1234567890 ١٢٣ Ⅷ ½",
    "<|endoftext|><|pad|><|mask|> <s></s> [MASK] <unk>",
    "日本語のテキスト、한국어 ไทย हिन्दी",
)


class CorpusTokenizer:
    """Encoder of text into ids, and decoder.

    Args:
        json_bytes: content of tokenizer.json, with the three special tokens among its added tokens.
        special: the three special tokens.
        name: where it came from, for messages.
        source: the files that it was made from, with the library that they belong to; None for a stored one.

    Raises:
        UsageError: it is not a supported tokenizer, see `byte_level_bpe` and `pieces`.
    """

    def __init__(self, json_bytes: bytes, special: SpecialTokens, *, name: str, source: Source | None = None) -> None:
        self._json_bytes = json_bytes
        self.special = special
        self.source = source
        self._name = name
        data = parse(json_bytes, name)
        self._bpe: ByteLevelBpe | None = None
        self._bytes_of_id = dict(_served(data, name))
        if not is_of_pieces(data):
            self._bpe = build(data, name)
        self._has_marks = is_of_pieces(data)
        self._nfc: Any = tokenizers.normalizers.NFC() if is_nfc(data.get("normalizer")) else None
        self._plain = _plain_tokens(data, name)
        try:
            self._hf: Any = tokenizers.Tokenizer.from_str(json_bytes.decode())
        except Exception as error:  # the library raises nothing narrower
            raise refuse(name, f"Hugging Face tokenizers cannot read it ({error})") from error
        self._hf.encode_special_tokens = True
        added = {token["content"]: int(token["id"]) for token in data.get("added_tokens") or []}
        for content, token in added.items():
            if self._hf.token_to_id(content) != token:
                raise refuse(name, f"the added token {content!r} does not keep its id {token}")
        self._text_of_special = {token: content for content, token in added.items()}
        self.eod_token_id = NO_TOKEN if special.eod is None else added[special.eod]
        self.pad_token_id = NO_TOKEN if special.pad is None else added[special.pad]
        self.mask_token_id = NO_TOKEN if special.mask is None else added[special.mask]
        self.vocab_size = 1 + max([*self._bytes_of_id, *added.values()])

    @cached_property
    def token_bytes(self) -> list[int]:
        """Number of UTF-8 bytes of each id; 0 for special tokens and for ids without an entry."""
        return [len(self._bytes_of_id.get(token, b"")) for token in range(self.vocab_size)]

    @property
    def digest(self) -> str:
        """H of the folder's (name, sha256) pairs in name order."""
        return hash_of(*[[name, sha256_bytes(data)] for name, data in sorted(self.files().items())])

    def encode(self, text: str) -> list[int]:
        """The ids of a text; special strings in it are ordinary text."""
        return [int(token) for token in self.encode_array(text).tolist()]

    def encode_array(self, text: str) -> npt.NDArray[np.int64]:
        """Like `encode`, as an int64 array [n]."""
        text = self._normalized(text)
        # tiktoken's pattern engine overflows its stack on very long white space
        is_long = len(text) >= _LONG_SPACES and _LONG_SPACE.search(text)
        if self._bpe is None or self._bpe.encoding is None or is_long or (self._plain and self._plain.search(text)):
            return np.array(self.encode_reference(text), dtype=np.int64)
        return self._bpe.encode(text, self._name)

    def _normalized(self, text: str) -> str:
        return text if self._nfc is None or text.isascii() else str(self._nfc.normalize_str(text))

    def is_complete(self, ids: npt.NDArray[np.int64], text: str) -> bool:
        """Return whether ids hold as many bytes as the text has; sentencepiece may put a space before it."""
        text = self._normalized(text)
        num_bytes = int(self._lengths[ids].sum())
        if not self._has_marks:
            return num_bytes == len(text.encode())
        return num_bytes - len(text.replace(SPACE_MARK, " ").encode()) in (0, 1)

    @cached_property
    def _lengths(self) -> npt.NDArray[np.int64]:
        return np.array(self.token_bytes, dtype=np.int64)

    def encode_reference(self, text: str) -> list[int]:
        """The same ids from Hugging Face tokenizers, several times slower; what `encode` is compared with."""
        return list(self._hf.encode(text, add_special_tokens=False).ids)

    def encode_template(self, text: str) -> list[int]:
        """The ids of a chat template's own text, in which the strings of added tokens become those tokens."""
        return list(self._with_markers.encode(text, add_special_tokens=False).ids)

    @cached_property
    def _with_markers(self) -> Any:
        return tokenizers.Tokenizer.from_str(self._json_bytes.decode())

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens show as their strings, bytes that are not UTF-8 as U+FFFD."""
        return b"".join(self._bytes_of(token) for token in ids).decode(errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes of ids, which may end inside a character; special tokens show as their strings."""
        return b"".join(self._bytes_of(token) for token in ids)

    def _bytes_of(self, token: int) -> bytes:
        raw = self._bytes_of_id.get(int(token))
        return raw if raw is not None else self._text_of_special.get(int(token), "\ufffd").encode()

    def files(self) -> dict[str, bytes]:
        """Name and content of the files in a tokenizer folder."""
        table: dict[str, Any] = {"vocab_size": self.vocab_size}
        ids = (self.eod_token_id, self.pad_token_id, self.mask_token_id)
        for kind, token, number in zip(
            ("eod", "pad", "mask"), (self.special.eod, self.special.pad, self.special.mask), ids, strict=True
        ):
            table[kind] = None if token is None else {"token": token, "id": number}
        return {TOKENIZER_NAME: self._json_bytes, SPECIAL_TOKENS_NAME: encode_document(SPECIAL_TOKENS, table)}

    def save(self, folder: str | Path) -> None:
        """Write the two files into a folder, which is created if it is missing.

        Raises:
            StorageError: the storage refused.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, data in sorted(self.files().items()):
            write_atomic(Path(folder) / name, data)

    def check_parity(self, texts: Iterable[str]) -> int:
        """Compare `encode` with Hugging Face tokenizers, and decode back, on these texts and a list of difficult ones.

        Returns:
            the number of texts compared.

        Raises:
            UsageError: a text gives other ids or does not read back; the tokenizer cannot be served.
        """
        count = 0
        for text in self._parity_texts(texts):
            self.check_text(text)
            count += 1
        return count

    def check_text(self, text: str) -> None:
        """`check_parity` of one text.

        Raises:
            UsageError: it gives other ids or does not read back.
        """
        ids, expected = self.encode(text), self.encode_reference(text)
        if ids != expected:
            place = next((i for i, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b), len(ids))
            near = self.decode(expected[max(0, place - 3) : place + 3])
            raise refuse(self._name, f"tiktoken and Hugging Face tokenizers disagree on text near {near!r}")
        source = self.source
        if source is not None and source.encode is not None and not self._names_added_token(text):
            self._compare(ids, source.encode(text), source.library, text)
        read, text = self.decode_bytes(ids), self._normalized(text)
        if self._has_marks:
            text = text.replace(SPACE_MARK, " ")
            read = read[1:] if read != text.encode() and read.startswith(b" ") else read
        if read != text.encode():
            raise refuse(self._name, f"the text {text[:40]!r} does not read back from its ids")

    def _compare(self, ids: list[int], expected: list[int], library: str, text: str) -> None:
        if ids != expected:
            raise refuse(self._name, f"{library} gives other ids for the text {text[:40]!r}")

    def _names_added_token(self, text: str) -> bool:
        return any(content in text for content in self._text_of_special.values())

    def _parity_texts(self, texts: Iterable[str]) -> Iterator[str]:
        special = self.special
        yield f"x {special.eod or ''}{special.pad or ''} {special.mask or ''}\n{special.mask or ''}"
        missing = frozenset[int]() if self._bpe is None else self._bpe.missing_bytes
        yield from (text for text in NASTY_TEXTS if missing.isdisjoint(text.encode()))
        yield from texts

    @classmethod
    def load(cls, folder: str | Path) -> CorpusTokenizer:
        """Read a tokenizer folder of a corpus or a checkpoint.

        Raises:
            UsageError: the folder is not there, or a newer version wrote it.
            DataIntegrityError: its files are damaged or contradict each other.
        """
        folder = Path(folder)
        try:
            json_bytes, table_bytes = (
                read_plain(folder / name, _MAX_BYTES) for name in (TOKENIZER_NAME, SPECIAL_TOKENS_NAME)
            )
        except FileNotFoundError as error:
            raise UsageError(
                f"{error.filename} does not exist, so {folder} is not a tokenizer folder. Nothing was read.",
                hint="it is the folder tokenizer/ of a corpus or a checkpoint",
            ) from error
        except NotPlainError as error:
            raise _damaged(folder, str(error)) from error
        table = decode_document(SPECIAL_TOKENS, table_bytes, folder / SPECIAL_TOKENS_NAME)
        try:
            texts = [None if (named := table[key]) is None else str(named["token"]) for key in ("eod", "pad", "mask")]
            special = SpecialTokens(eod=texts[0], pad=texts[1], mask=texts[2])
            tokenizer = cls(json_bytes, special, name=str(folder / TOKENIZER_NAME))
            is_same = tokenizer.files()[SPECIAL_TOKENS_NAME] == table_bytes
        except (ValueError, KeyError, TypeError, RecursionError, UsageError) as error:
            raise _damaged(folder, str(error)) from error
        if not is_same:
            raise _damaged(folder, f"{SPECIAL_TOKENS_NAME} does not describe {TOKENIZER_NAME}")
        return tokenizer

    @classmethod
    def from_file(
        cls, path: str | Path, special: SpecialTokens, *, pattern: str | None = None, has_own_eod: bool = False
    ) -> CorpusTokenizer:
        """Load a published tokenizer and add, at the end, those of the three special tokens that it lacks.

        Args:
            path: see `sources.load_source`. pattern: of a tiktoken file.
            has_own_eod: its own end-of-sentence token is the end of a document, in place of special.eod.

        Raises:
            UsageError: the file is missing or not a supported tokenizer, or a special token is an ordinary entry.
        """
        if not has_own_eod:
            special.check()
        source = load_source(Path(path), pattern)
        name = str(path)
        if has_own_eod:
            if source.eos is None:
                raise UsageError(
                    f"corpus.tokenizer.eod_token is null, but {name} does not name an end-of-sentence token. "
                    "Nothing was written.",
                    hint="set corpus.tokenizer.eod_token to the text of the token, as </s> or <|endoftext|>",
                )
            special = replace(special, eod=source.eos)
            special.check()
        return cls(_with_special(source.data, special, name), special, name=name, source=source)

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        *,
        vocab_size: int,
        special: SpecialTokens,
        on_wait: Callable[[], None] = lambda: None,
    ) -> CorpusTokenizer:
        """Train a byte-level BPE; the same texts in the same order give the same bytes.

        Args:
            texts: what to learn merges from.
            vocab_size: entries wanted, special tokens included; a small text may yield fewer.
            special: take the last three ids.
            on_wait: called about once a second while the merges are being learned.

        Raises:
            UsageError: vocab_size is below 259, the bytes and the special tokens.
        """
        special.check()
        if vocab_size < _BYTES + NUM_SPECIAL:
            raise UsageError(
                f"corpus.tokenizer.vocab_size is {vocab_size}; allowed: >= {_BYTES + NUM_SPECIAL}, the 256 bytes and "
                "three special tokens. Nothing was written."
            )
        name = "the trained tokenizer"
        data = json.loads(train_byte_level_bpe(texts, vocab_size - NUM_SPECIAL, on_wait=on_wait))
        return cls(_with_special(data, special, name), special, name=name)


def verify_files(folder: Path, digest: str) -> None:
    """Compare the two files of a corpus' tokenizer folder with the digest in its manifest, without loading them.

    Raises:
        DataIntegrityError: one is missing, or their digest is another.
        StorageError: the storage does not answer.
    """
    pairs: list[list[str]] = []
    for name in sorted((TOKENIZER_NAME, SPECIAL_TOKENS_NAME)):
        try:
            with storage_errors(f"reading {folder / name}"):
                pairs.append([name, sha256_bytes((folder / name).read_bytes())])
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise _damaged(folder, f"{folder / name} is missing, or no file") from None
    if (found := hash_of(*pairs)) != digest:
        raise _damaged(folder, f"the digest of {' and '.join(name for name, _ in pairs)} is {found}, not {digest}")


def _damaged(folder: Path, what: str) -> DataIntegrityError:
    return DataIntegrityError(
        f"{folder}: the tokenizer is damaged: {what}. Nothing was decoded.",
        hint="restore the folder or prepare the corpus again",
    )


def _served(data: dict[str, Any], name: str) -> dict[int, bytes]:
    """The bytes of each id of text, plain added tokens included; refuses what is not supported."""
    try:
        of_text = bytes_of_pieces(data, name) if is_of_pieces(data) else dict(build(data, name).bytes_of_id)
        plain = {int(t["id"]): t["content"].encode() for t in data.get("added_tokens") or [] if not t.get("special")}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise refuse(name, f"a part of it is missing or has the wrong type ({error!r})") from error
    return of_text | plain


def _plain_tokens(data: dict[str, Any], name: str) -> re.Pattern[str] | None:
    """The added tokens that text turns into, as Hugging Face tokenizers finds them."""
    plain = [token for token in data.get("added_tokens") or [] if not token.get("special")]
    if greedy := [token["content"] for token in plain if token.get("lstrip") or token.get("rstrip")]:
        raise refuse(name, f"the added tokens {greedy[:5]} swallow the spaces beside them")
    return re.compile("|".join(re.escape(token["content"]) for token in plain)) if plain else None


def _with_special(data: dict[str, Any], special: SpecialTokens, name: str) -> bytes:
    """tokenizer.json with the three special tokens among its added tokens."""
    _served(data, name)  # refuses what is not supported, before anything of it is relied upon
    chosen = (special.eod, special.pad, special.mask)
    added = [dict(token) | ({"special": True} if token["content"] in chosen else {}) for token in _added(data)]
    known = {token["content"]: token for token in added}
    vocab = vocabulary(data["model"])
    next_id = 1 + max([*vocab.values(), *(token["id"] for token in added)])
    for content in _missing(special, known):
        if content in vocab:
            raise UsageError(
                f"{name}: {content!r} is an ordinary entry of the vocabulary, so text could turn into it. "
                "Nothing was written.",
                hint="choose other strings for corpus.tokenizer.eod_token, pad_token and mask_token",
            )
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added.append({"id": next_id, "content": content, **flags, "special": True})
        next_id += 1
    data = data | {"added_tokens": added}
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _added(data: dict[str, Any]) -> list[dict[str, Any]]:
    return list(data.get("added_tokens") or [])


def _missing(special: SpecialTokens, known: dict[str, Any]) -> Sequence[str]:
    wanted = (special.eod, special.pad, special.mask)
    return [content for content in wanted if content is not None and content not in known]
