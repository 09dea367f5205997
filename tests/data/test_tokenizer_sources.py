"""Tokenizers as other projects publish them: the ids are those of the library that the files belong to."""

from __future__ import annotations

import base64
import io
import json
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from megamask.config.schema.corpus import TokenizerConfig
from megamask.data.corpus.prepare import build
from megamask.data.manifest import Manifest
from megamask.data.tokenizer import CorpusTokenizer, SpecialTokens
from megamask.data.tokenizer.byte_level_bpe import letter_of_byte
from megamask.data.tokenizer.sources import load_source
from megamask.data.tokenizer.tiktoken_file import PATTERNS
from megamask.data.verify import verify_corpus
from megamask.errors import UsageError
from support.texts import corpus_config, write_inputs

OWN = SpecialTokens(eod="", pad="<|pad|>", mask="<|mask|>")
SPECIAL = SpecialTokens(eod="<|endoftext|>", pad="<|pad|>", mask="<|mask|>")
LIBRARY = Path(sysconfig.get_paths()["stdlib"])
TEXTS = [(LIBRARY / name).read_text()[:20_000] for name in ("heapq.py", "textwrap.py", "this.py", "types.py")]
TEXTS += [
    "日本語のテキスト、한국어 ไทย हिन्दी é e\u0301 12345 1234567",
    " " * 40 + "x\t\t\r\n\n  y",
    "\u2581 a mark\u2581",
]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with encoder.json and vocab.bpe."""
    folder = tmp_path_factory.mktemp("gpt2")
    library = tokenizers.ByteLevelBPETokenizer()
    library.train_from_iterator(TEXTS, vocab_size=600, special_tokens=["<|endoftext|>"], show_progress=False)
    library.save_model(str(folder))
    (folder / "vocab.json").rename(folder / "encoder.json")
    (folder / "merges.txt").rename(folder / "vocab.bpe")
    return folder


def check(tokenizer: CorpusTokenizer, expected: Any) -> None:
    """The ids equal those of a library on real text, and read back from a stored folder."""
    for text in TEXTS:
        assert tokenizer.encode(text) == expected(text)
    assert tokenizer.check_parity(TEXTS) > len(TEXTS)


@pytest.mark.promise("a tokenizer is loaded from GPT-2's vocab and merges, with the ids of its own library")
@pytest.mark.parametrize("name", ["", "encoder.json", "vocab.bpe"])
def test_vocab_and_merges_of_gpt2_give_the_library_s_ids(gpt2: Path, name: str) -> None:
    tokenizer = CorpusTokenizer.from_file(gpt2 / name, OWN, has_own_eod=True)
    library = tokenizers.ByteLevelBPETokenizer(str(gpt2 / "encoder.json"), str(gpt2 / "vocab.bpe"))
    check(tokenizer, lambda text: library.encode(text).ids)
    assert tokenizer.special.eod == "<|endoftext|>"
    assert tokenizer.eod_token_id == library.token_to_id("<|endoftext|>")


def hub_folder(gpt2: Path, folder: Path, **changes: Any) -> Path:
    """A folder as Hugging Face publishes it."""
    data = load_source(gpt2, None).data | changes
    (folder / "tokenizer.json").write_text(json.dumps(data))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|endoftext|>"}}))
    return folder


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = [{"type": "Digits", "individual_digits": True}, BYTES]
EOT = {"id": 0, "content": "<|endoftext|>", "special": True}
PLAIN = {"id": 600, "content": "<think>", "special": False}
FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)


@pytest.mark.promise("a tokenizer is loaded from a Hugging Face folder, with the ids of its own library")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": DIGITS}},
        {"added_tokens": [EOT | FLAGS, PLAIN | FLAGS]},
    ],
    ids=["plain", "nfc", "digits", "token_of_text"],
)
def test_hugging_face_folder_gives_the_library_s_ids(gpt2: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = hub_folder(gpt2, tmp_path, **changes)
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer = CorpusTokenizer.from_file(folder, OWN, has_own_eod=True)
    check(tokenizer, lambda text: library.encode(text, add_special_tokens=False).ids)
    text = "a <think> b<think>"
    assert tokenizer.encode(text) == library.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(tokenizer.encode(text)) == text
    tokenizer.save(tmp_path / "stored")
    assert CorpusTokenizer.load(tmp_path / "stored").encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


def tiktoken_file(gpt2: Path, folder: Path) -> tuple[Path, dict[bytes, int]]:
    """The same merges as ranks, the form that tiktoken publishes."""
    byte_of = {letter: bytes([byte]) for byte, letter in letter_of_byte().items()}
    tokens = [bytes([byte]) for byte in range(255, -1, -1)]  # the ids of bytes follow no order that could be guessed
    for line in (gpt2 / "vocab.bpe").read_text().splitlines()[1:]:
        tokens.append(b"".join(byte_of[letter] for letter in line.replace(" ", "")))
    ranks = {token: rank for rank, token in enumerate(dict.fromkeys(tokens))}
    file = folder / "small.tiktoken"
    file.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()))
    return file, ranks


@pytest.mark.promise("a tokenizer is loaded from a tiktoken file, with the ids of its own library")
@pytest.mark.parametrize("pattern", [*PATTERNS, r"\s+|\S+"])
def test_tiktoken_file_gives_the_library_s_ids(gpt2: Path, tmp_path: Path, pattern: str) -> None:
    import tiktoken

    file, ranks = tiktoken_file(gpt2, tmp_path)
    regex = PATTERNS.get(pattern, pattern)
    library = tiktoken.Encoding("small", pat_str=regex, mergeable_ranks=ranks, special_tokens={})
    tokenizer = CorpusTokenizer.from_file(file, SPECIAL, pattern=pattern)
    check(tokenizer, library.encode_ordinary)
    assert tokenizer.vocab_size == len(ranks) + 3


def sentencepiece_model(folder: Path, **options: Any) -> Path:
    import sentencepiece

    written = io.BytesIO()
    lines = [line for text in TEXTS for line in text.splitlines() if line]
    settings = {"vocab_size": 500, "byte_fallback": True, "normalization_rule_name": "identity", "minloglevel": 2}
    settings |= {"remove_extra_whitespaces": False, "hard_vocab_limit": False, "num_threads": 1}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=written, **(settings | options)
    )
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    return folder


@pytest.mark.promise("a tokenizer is loaded from a sentencepiece model, with the ids of its own library")
@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "bpe"},
        {"model_type": "bpe", "add_dummy_prefix": False, "user_defined_symbols": ["<think>"]},
        {"model_type": "unigram"},
    ],
    ids=["bpe", "bpe_with_symbols", "unigram"],
)
def test_sentencepiece_model_gives_the_library_s_ids(tmp_path: Path, options: dict[str, Any]) -> None:
    import sentencepiece

    folder = sentencepiece_model(tmp_path, **options)
    library = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizer = CorpusTokenizer.from_file(folder, OWN, has_own_eod=True)
    check(tokenizer, lambda text: list(library.encode(text)))
    assert tokenizer.eod_token_id == library.eos_id()
    assert "<|mask|></s>" in tokenizer.decode(tokenizer.encode("<|mask|></s>"))
    assert tokenizer.mask_token_id not in tokenizer.encode("<|mask|>")


@pytest.mark.promise("a published tokenizer makes a corpus, and its own EOS ends the documents")
def test_corpus_of_a_sentencepiece_model_verifies_and_ends_documents_with_its_eos(tmp_path: Path) -> None:
    (tmp_path / "published").mkdir()
    folder = sentencepiece_model(tmp_path / "published", model_type="bpe")
    asked = TokenizerConfig(path=str(folder), eod_token=None)
    inputs = write_inputs(tmp_path / "inputs")
    build(corpus_config(inputs, tmp_path / "corpus", tokenizer=asked))
    manifest = Manifest.load(tmp_path / "corpus")
    assert manifest.eod_token_id == 2
    options = manifest.content["options"]["tokenizer"]
    assert options["eod_token"] == "</s>"
    assert (options["source"]["kind"], list(options["source"]["files"])) == ("sentencepiece", ["tokenizer.model"])
    verify_corpus(tmp_path / "corpus")
    again = build(corpus_config(inputs, tmp_path / "corpus", tokenizer=asked))
    assert again.reused


@pytest.mark.promise("a tokenizer that cannot be used is refused with what to do")
def test_what_is_refused_names_what_to_do(gpt2: Path, tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    file, _ = tiktoken_file(gpt2, tmp_path / "t")
    lossy = sentencepiece_model(tmp_path, model_type="unigram", normalization_rule_name="nmt_nfkc")
    (tmp_path / "empty").mkdir()
    (tmp_path / "noise.bin").write_bytes(b"\0\1")
    bare = tmp_path / "bare.json"
    bare.write_text(json.dumps(load_source(gpt2, None).data))
    for path, options, message, hint in (
        (file, {}, "does not contain the pattern", "set corpus.tokenizer.pattern to gpt2, cl100k_base, o200k_base"),
        (file, {"pattern": "(("}, "is not a pattern", "another corpus.tokenizer.path"),
        (gpt2, {"pattern": "gpt2"}, "is not a tiktoken file", "corpus.tokenizer.pattern=null"),
        (lossy, {}, "'nmt_nfkc' changes text", "--normalization_rule_name=identity"),
        (tmp_path / "empty", {}, "holds no tokenizer files; needed: tokenizer.json", "name the file"),
        (
            tmp_path / "noise.bin",
            {},
            "not a sentencepiece model and not a tiktoken file",
            "corpus.tokenizer.vocab_size",
        ),
        (tmp_path / "gone", {}, "cannot be read", "name a tokenizer file"),
        (bare, {"has_own_eod": True}, "does not name an end-of-sentence token", "set corpus.tokenizer.eod_token"),
    ):
        with pytest.raises(UsageError) as caught:
            CorpusTokenizer.from_file(path, SPECIAL, **options)
        assert message in caught.value.message, path
        assert hint in str(caught.value.hint), path
