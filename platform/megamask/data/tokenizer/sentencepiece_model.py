"""A sentencepiece model in the form of tokenizer.json."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from megamask.data.tokenizer.pieces import SPACE_MARK
from megamask.data.tokenizer.refusal import refuse
from megamask.data.tokenizer.sources import Source, added_token
from megamask.errors import UsageError
from megamask.storage.hashing import sha256_bytes

_UNIGRAM, _BPE = 1, 2  # TrainerSpec.model_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5  # ModelProto.SentencePiece.type
_NEVER = -1e9  # the score of a piece that is not text
_TRAIN_HINT = (
    "train it with --byte_fallback=true --normalization_rule_name=identity --remove_extra_whitespaces=false, or train "
    "a byte-level BPE here with corpus.tokenizer.vocab_size"
)


def read_sentencepiece(file: Path, content: bytes) -> Source:
    """Read a .model file.

    Args:
        content: of the file.

    Raises:
        UsageError: the library is not installed, the file is damaged, or text would not read back from its ids.
    """
    name = str(file)
    try:
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2 as messages
    except ImportError as error:
        raise UsageError(
            f"corpus.tokenizer.path: {name} needs the package sentencepiece ({error}). Nothing was written.",
            hint='pip install "megamask[sentencepiece]", or sentencepiece and protobuf',
        ) from error
    try:
        library: Any = sentencepiece.SentencePieceProcessor(model_proto=content)
        model: Any = messages.ModelProto.FromString(content)
    except Exception as error:
        raise refuse(name, f"not a sentencepiece model ({type(error).__name__})") from error
    _check(model, name)
    pieces = [(piece.piece, piece.score, piece.type) for piece in model.pieces]
    eos = library.id_to_piece(library.eos_id()) if library.eos_id() >= 0 else None
    return Source(
        kind="sentencepiece",
        files={file.name: sha256_bytes(content)},
        data=_as_json(pieces, model),
        eos=eos,
        library="sentencepiece",
        encode=lambda text: [int(token) for token in library.encode(text)],
    )


def _check(model: Any, name: str) -> None:
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    for is_so, reason in (
        (trainer.model_type not in (_UNIGRAM, _BPE), "its model is neither BPE nor Unigram"),
        (not trainer.byte_fallback, "it has no byte_fallback, so unknown characters would be lost"),
        (bool(normalizer.precompiled_charsmap), f"its normalization {normalizer.name!r} changes text"),
        (normalizer.remove_extra_whitespaces, "it removes extra white space, so text would not read back as it was"),
        (not normalizer.escape_whitespaces, "it does not mark white space"),
        (trainer.treat_whitespace_as_suffix, "it treats white space as a suffix"),
    ):
        if is_so:
            raise refuse(name, reason, hint=_TRAIN_HINT)


def _as_json(pieces: list[tuple[str, float, int]], model: Any) -> dict[str, Any]:
    vocab = {piece: number for number, (piece, _, _) in enumerate(pieces)}
    # tokenizers would put the space of add_dummy_prefix after each user-defined symbol as well; text becomes none then
    are_symbols_of_text = not model.normalizer_spec.add_dummy_prefix
    added = [
        added_token(number, piece, is_special=kind != _USER_DEFINED or not are_symbols_of_text)
        for number, (piece, _, kind) in enumerate(pieces)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}]
    if model.normalizer_spec.add_dummy_prefix:
        steps.insert(0, {"type": "Prepend", "prepend": SPACE_MARK})
    make = _bpe if model.trainer_spec.model_type == _BPE else _unigram
    unknown = next((piece for piece, _, kind in pieces if kind == _UNKNOWN), None)
    decoder: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if model.normalizer_spec.add_dummy_prefix:
        decoder.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoder},
        "model": make(pieces, vocab, unknown),
    }


def _bpe(pieces: list[tuple[str, float, int]], vocab: dict[str, int], unknown: str | None) -> dict[str, Any]:
    """Order merges as sentencepiece does: the pair whose piece has the highest score, of equal ones the leftmost.

    Pieces that share a score are runs of one character. There the leftmost pair is the one whose left part has grown
    longest.
    """
    mergeable = {piece for piece, _, kind in pieces if kind == _NORMAL}
    num_pieces = Counter(score for _, score, kind in pieces if kind == _NORMAL)
    merges: list[tuple[float, int, int, int, list[str]]] = []
    for piece, score, kind in pieces:
        if kind != _NORMAL:
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in mergeable and right in mergeable:
                grown = -len(left) if num_pieces[score] > 1 else 0
                merges.append((-score, grown, vocab[left], vocab[right], [left, right]))
    return {
        "type": "BPE",
        "unk_token": unknown,
        "fuse_unk": True,
        "byte_fallback": True,
        "vocab": vocab,
        "merges": [pair for *_, pair in sorted(merges)],
    }


def _unigram(pieces: list[tuple[str, float, int]], vocab: dict[str, int], unknown: str | None) -> dict[str, Any]:
    return {
        "type": "Unigram",
        "unk_id": None if unknown is None else vocab[unknown],
        "byte_fallback": True,
        "vocab": [[piece, score if kind in (_NORMAL, _USER_DEFINED) else _NEVER] for piece, score, kind in pieces],
    }
