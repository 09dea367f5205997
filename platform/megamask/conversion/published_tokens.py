"""Special ids and tokenizer of a published model, from its config.json and its tokenizer's files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal

from megamask.conversion.hub_folder import HubFolder
from megamask.data.tokenizer import CorpusTokenizer, SpecialTokens
from megamask.errors import UsageError
from megamask.models.families.base import Family, TokenIds
from megamask.models.spec import ModelSpec
from megamask.models.vocabulary import NO_ID, Vocabulary

IdSource = Literal["config", "tokenizer"]
KINDS = tuple(item.name for item in fields(TokenIds))


def special_ids(folder: HubFolder, family: Family, *, prefer: IdSource | None) -> TokenIds:
    """The special ids: those of config.json, then those of the tokenizer, then the family's published ones.

    Args:
        prefer: which file decides where the two differ; None refuses a difference.

    Raises:
        UsageError: config.json and the tokenizer name different ids; each is listed.
    """
    of_config, of_tokenizer = _configured(folder.config), tokenizer_ids(folder)
    differing = [
        kind
        for kind in KINDS
        if of_config.get(kind) and kind in of_tokenizer and of_tokenizer[kind] not in of_config[kind]
    ]
    if differing and prefer is None:
        listed = "; ".join(
            f"{kind}_token_id is {', '.join(map(str, of_config[kind]))} in config.json and {of_tokenizer[kind]} in the "
            "tokenizer's files"
            for kind in differing
        )
        raise UsageError(
            f"{folder.path}: {listed}. Nothing was converted.",
            hint="correct the folder, or choose with --ids config or --ids tokenizer",
        )
    changed = {f"{kind}_token_id": of_tokenizer[kind] for kind in differing if prefer == "tokenizer"}
    added = {f"{kind}_token_id": token for kind, token in of_tokenizer.items() if not of_config.get(kind)}
    return family.token_ids({**folder.config, **added, **changed})


def vocabulary_of(spec: ModelSpec, ids: TokenIds) -> Vocabulary:
    """The vocabulary of a published model. A padding id that is also the end of a document is left out: that token is
    scored, padding never is."""

    def or_none(token: int | None) -> int:
        return NO_ID if token is None else token

    return Vocabulary(
        vocab_size=spec.vocab_size,
        padded_vocab_size=spec.padded_vocab_size,
        mask_token_id=or_none(ids.mask),
        eod_token_id=or_none(ids.eos),
        pad_token_id=NO_ID if ids.pad == ids.eos else or_none(ids.pad),
    )


def published_tokenizer(folder: HubFolder, vocabulary: Vocabulary) -> tuple[CorpusTokenizer | None, str | None]:
    """The tokenizer as evaluation and sampling use it, and why there is none although tokenizer.json exists."""
    path = folder.path / "tokenizer.json"
    if not path.is_file():
        return None, None
    content = {token: text for text, token in _added_tokens(folder).items()}
    ids = {"eod": vocabulary.eod_token_id, "pad": vocabulary.pad_token_id, "mask": vocabulary.mask_token_id}
    missing = [f"{kind} {token}" for kind, token in ids.items() if token != NO_ID and token not in content]
    if missing:
        return None, f"tokenizer.json has no added token for {', '.join(missing)}"
    try:
        tokenizer = CorpusTokenizer(
            path.read_bytes(),
            SpecialTokens(**{kind: None if token == NO_ID else content[token] for kind, token in ids.items()}),
            name=path.name,
        )
    except UsageError as error:
        return None, error.message.removesuffix(" Nothing was written.")
    if tokenizer.vocab_size > vocabulary.vocab_size:
        return (
            None,
            f"tokenizer.json has ids up to {tokenizer.vocab_size - 1}, the embedding {vocabulary.vocab_size} rows",
        )
    return tokenizer, None


def tokenizer_ids(folder: HubFolder) -> dict[str, int]:
    """Kind of special token -> id, as far as the tokenizer's files name them."""
    added = _added_tokens(folder)
    found: dict[str, int] = {}
    for document in (folder.document("special_tokens_map.json"), folder.document("tokenizer_config.json")):
        for kind in KINDS:
            value = document.get(f"{kind}_token")
            text = value.get("content") if isinstance(value, Mapping) else value
            if isinstance(text, str) and text in added:
                found[kind] = added[text]
    return found


def _added_tokens(folder: HubFolder) -> dict[str, int]:
    """Text -> id of the tokens that are not made by merging."""
    listed: list[Any] = folder.document("tokenizer.json").get("added_tokens") or []
    found = {
        entry["content"]: entry["id"]
        for entry in listed
        if isinstance(entry, Mapping) and isinstance(entry.get("content"), str) and type(entry.get("id")) is int
    }
    decoder = folder.document("tokenizer_config.json").get("added_tokens_decoder") or {}
    if isinstance(decoder, Mapping):
        for number, entry in decoder.items():
            if isinstance(entry, Mapping) and isinstance(entry.get("content"), str) and str(number).isdigit():
                found.setdefault(entry["content"], int(number))
    return found


def _configured(config: Mapping[str, Any]) -> dict[str, list[int]]:
    """Kind -> the ids that config.json names: one, or several ends of a turn."""
    found: dict[str, list[int]] = {}
    for kind in KINDS:
        value = config.get(f"{kind}_token_id")
        found[kind] = [item for item in (value if isinstance(value, list) else [value]) if type(item) is int]
    return found
