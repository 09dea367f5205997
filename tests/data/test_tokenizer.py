from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from megamask.data.tokenizer import CorpusTokenizer, SpecialTokens
from megamask.data.tokenizer.byte_level_bpe import build, letter_of_byte
from megamask.data.tokenizer.train_bpe import words_to_learn_from
from megamask.errors import DataIntegrityError, ExitCode, UsageError
from megamask.storage.hashing import hash_of, sha256_bytes

SPECIAL = SpecialTokens(eod="<|endoftext|>", pad="<|pad|>", mask="<|mask|>")
TEXTS = ["def function(self, value):\n    return value + 1\n" * 20, "The quick brown fox, it's 42 jumps. " * 30]
LLAMA_LIKE = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"


def trained(vocab_size: int = 300) -> CorpusTokenizer:
    return CorpusTokenizer.train(TEXTS, vocab_size=vocab_size, special=SPECIAL)


TOKENIZER = trained()


def artefact(**changes: Any) -> dict[str, Any]:
    """A plain tokenizer.json without special tokens, as other programs make it."""
    data = json.loads(TOKENIZER.files()["tokenizer.json"])
    data["added_tokens"] = []
    return data | changes


def write(data: Any, folder: Path) -> Path:
    path = folder / "given.json"
    path.write_text(json.dumps(data))
    return path


@pytest.mark.promise("tiktoken and Hugging Face tokenizers give the same ids")
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_encode_equals_hugging_face_and_reads_back(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert ids == TOKENIZER.encode_reference(text)
    assert TOKENIZER.decode(ids) == text
    assert sum(TOKENIZER.token_bytes[token] for token in ids) == len(text.encode())


@pytest.mark.promise("special strings in text stay text")
def test_special_strings_in_text_stay_text() -> None:
    text = "a<|mask|>b<|pad|><|endoftext|>"
    special = {TOKENIZER.eod_token_id, TOKENIZER.pad_token_id, TOKENIZER.mask_token_id}
    assert not special & set(TOKENIZER.encode(text))
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    plain = tokenizers.Tokenizer.from_str(TOKENIZER.files()["tokenizer.json"].decode())
    assert special <= set(plain.encode(text).ids), "the artefact itself knows the special tokens"


def test_special_tokens_are_the_last_three_ids_and_stand_for_no_bytes() -> None:
    assert (TOKENIZER.eod_token_id, TOKENIZER.pad_token_id, TOKENIZER.mask_token_id) == (297, 298, 299)
    assert TOKENIZER.vocab_size == 300
    assert TOKENIZER.token_bytes[297:] == [0, 0, 0]
    assert min(TOKENIZER.token_bytes[:297]) == 1
    assert TOKENIZER.decode([299, *TOKENIZER.encode("x"), 297]) == "<|mask|>x<|endoftext|>"


def test_training_gives_the_same_bytes_in_another_process() -> None:
    program = (
        "import sys, json; from megamask.data.tokenizer import *;"
        "t = CorpusTokenizer.train(json.loads(sys.stdin.read()), vocab_size=300,"
        " special=SpecialTokens(eod='<|endoftext|>', pad='<|pad|>', mask='<|mask|>')); sys.stdout.write(t.digest)"
    )
    texts = json.dumps(TEXTS)
    for seed, threads in (("1", "1"), ("2", "4")):
        environment = os.environ | {"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads}
        done = subprocess.run(
            [sys.executable, "-c", program], input=texts, env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout == TOKENIZER.digest


@pytest.mark.promise("one very long word does not stop the training of a tokenizer")
def test_very_long_word_is_learned_from_in_pieces() -> None:
    """The trainer never sees a longer word: its time grows with the square of the length (300,000: minutes)."""
    texts = [*TEXTS, "x" * 300_000, "日本語" * 20_000]
    words = [word for text in texts for word, _ in words_to_learn_from().pre_tokenize_str(text)]
    assert max(map(len, words)) == 4096
    tokenizer = CorpusTokenizer.train(texts, vocab_size=300, special=SPECIAL)
    assert json.loads(tokenizer.files()["tokenizer.json"])["pre_tokenizer"]["type"] == "ByteLevel"
    assert tokenizer.decode(tokenizer.encode(texts[2])) == texts[2]


def test_words_of_ordinary_length_are_learned_from_as_they_are() -> None:
    whole: Any = tokenizers.Tokenizer(tokenizers.models.BPE())
    whole.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=597,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    )
    texts = [*TEXTS, "ab" * 2048, "aba" * 1000]
    whole.train_from_iterator(iter(texts), trainer=trainer)
    trained = CorpusTokenizer.train(texts, vocab_size=600, special=SPECIAL)
    assert json.loads(trained.files()["tokenizer.json"])["model"] == json.loads(whole.to_str())["model"]


def test_training_on_little_text_records_the_true_size() -> None:
    tokenizer = CorpusTokenizer.train(["ab"], vocab_size=5000, special=SPECIAL)
    assert tokenizer.vocab_size == 259
    assert tokenizer.encode("abc") == tokenizer.encode_reference("abc")


def test_training_is_refused_below_the_bytes_and_special_tokens() -> None:
    with pytest.raises(UsageError, match=r"vocab_size is 258; allowed: >= 259"):
        trained(258)


def test_folder_reads_back_with_the_same_digest(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path / "tokenizer")
    again = CorpusTokenizer.load(tmp_path / "tokenizer")
    assert again.digest == TOKENIZER.digest
    assert again.encode(TEXTS[0]) == TOKENIZER.encode(TEXTS[0])
    shas = [
        [name, sha256_bytes((tmp_path / "tokenizer" / name).read_bytes())]
        for name in ("special_tokens.json", "tokenizer.json")
    ]
    assert again.digest == hash_of(*shas)


def test_long_white_space_is_encoded_like_any_other() -> None:
    text = "x" + " " * 1_200_000 + "y"
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text


def test_loaded_tokenizer_gets_missing_special_tokens_at_its_end(tmp_path: Path) -> None:
    eod = {"id": 297, "content": "<|endoftext|>", "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    path = write(artefact(added_tokens=[eod | flags]), tmp_path)
    tokenizer = CorpusTokenizer.from_file(path, SPECIAL)
    assert (tokenizer.eod_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id) == (297, 298, 299)
    assert tokenizer.digest == CorpusTokenizer.from_file(path, SPECIAL).digest
    assert tokenizer.encode(TEXTS[1]) == TOKENIZER.encode(TEXTS[1])


def test_loaded_tokenizer_with_ids_out_of_merge_order_keeps_its_ids(tmp_path: Path) -> None:
    data = artefact()
    last = len(data["model"]["vocab"]) - 1
    data["model"]["vocab"] = {entry: last - token for entry, token in data["model"]["vocab"].items()}
    tokenizer = CorpusTokenizer.from_file(write(data, tmp_path), SPECIAL)
    assert tokenizer.check_parity(TEXTS) > len(TEXTS)
    assert tokenizer.encode(TEXTS[0]) == [last - token for token in TOKENIZER.encode(TEXTS[0])]


def test_loaded_tokenizer_with_a_split_pattern_passes_the_parity_gate(tmp_path: Path) -> None:
    split = {"type": "Split", "pattern": {"Regex": LLAMA_LIKE}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    steps = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    tokenizer = CorpusTokenizer.from_file(write(artefact(pre_tokenizer=steps), tmp_path), SPECIAL)
    assert tokenizer.check_parity(TEXTS) > len(TEXTS)
    assert tokenizer.encode("1234567") == tokenizer.encode_reference("1234567")


def test_parity_gate_refuses_a_tokenizer_that_tiktoken_runs_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = trained()
    other = CorpusTokenizer.train(["zq zq zq zq qz qz"], vocab_size=300, special=SPECIAL)
    monkeypatch.setattr(tokenizer, "encode_reference", other.encode_reference)
    with pytest.raises(UsageError, match="disagree on text"):
        tokenizer.check_parity(TEXTS)


def test_letters_of_bytes_are_those_of_hugging_face() -> None:
    assert sorted(letter_of_byte().values()) == sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert len(set(letter_of_byte().values())) == 256


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "normalizer": ({"normalizer": {"type": "NFKC"}}, "a normalizer other than NFC"),
    "word_piece": ({"model": {"type": "WordPiece", "vocab": {}}}, "its model is 'WordPiece'"),
    "metaspace": ({"pre_tokenizer": {"type": "Metaspace"}}, "does not end with ByteLevel"),
    "no_pre_tokenizer": ({"pre_tokenizer": None}, "does not end with ByteLevel"),
    "prefix_space": ({"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True}}, "space before the text"),
    "three_steps": (
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits"}, {"type": "X"}, BYTE_LEVEL]}},
        "options not known",
    ),
    "greedy_added_token": (
        {"added_tokens": [{"id": 297, "content": "<think>", "special": False, "lstrip": True}]},
        "swallow the spaces",
    ),
    "truncation": ({"truncation": {"max_length": 5}}, "truncation"),
    "model_missing": ({"model": 3}, "not a tokenizer.json"),
    "vocab_missing": ({"model": {"type": "BPE", "merges": []}}, "missing or has the wrong type"),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_unsupported_tokenizer_is_refused_with_the_reason(case: str, tmp_path: Path) -> None:
    changes, reason = REFUSED[case]
    with pytest.raises(UsageError, match=reason) as caught:
        CorpusTokenizer.from_file(write(artefact(**changes), tmp_path), SPECIAL)
    assert "supported are byte-level BPE" in caught.value.message
    assert caught.value.exit_code == ExitCode.USAGE


def test_unsupported_model_parts_are_refused() -> None:
    for change, reason in (
        ({"byte_fallback": True}, "byte_fallback"),
        ({"merges": ["a b c d"]}, "gives no entry"),
        ({"vocab": {"a": 0}, "merges": []}, "lacks 205 bytes of UTF-8 text"),
        ({"vocab": {"日": 0}, "merges": []}, "does not represent bytes"),
    ):
        data = artefact()
        data["model"] |= change
        with pytest.raises(UsageError, match=reason):
            build(data, "given.json")


def test_ordinary_entry_is_refused_as_a_special_token(tmp_path: Path) -> None:
    special = SpecialTokens(eod="a", pad="<|pad|>", mask="<|mask|>")
    with pytest.raises(UsageError, match="ordinary entry"):
        CorpusTokenizer.from_file(write(artefact(), tmp_path), special)


def test_special_tokens_are_refused_when_they_are_not_three() -> None:
    for tokens in (("a", "a", "b"), ("", "a", "b")):
        with pytest.raises(UsageError, match="three different strings"):
            SpecialTokens(eod=tokens[0], pad=tokens[1], mask=tokens[2]).check()


def test_missing_file_or_folder_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"corpus\.tokenizer\.path"):
        CorpusTokenizer.from_file(tmp_path / "gone.json", SPECIAL)
    with pytest.raises(UsageError, match="not a tokenizer folder"):
        CorpusTokenizer.load(tmp_path)


def test_file_that_is_not_json_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b"\xff\xfe not json")
    with pytest.raises(UsageError, match="not JSON"):
        CorpusTokenizer.from_file(tmp_path / "x.json", SPECIAL)


@pytest.mark.parametrize("name", ["tokenizer.json", "special_tokens.json"])
def test_damaged_folder_is_a_data_error(name: str, tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data.replace(b"<|mask|>", b"<|mesk|>"))
    with pytest.raises(DataIntegrityError, match="the tokenizer is damaged"):
        CorpusTokenizer.load(tmp_path)


def test_folder_of_a_newer_version_is_a_usage_error(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path)
    path = tmp_path / "special_tokens.json"
    path.write_bytes(path.read_bytes().replace(b'"version":1', b'"version":2'))
    with pytest.raises(UsageError, match="has format version 2, this megamask reads megamask-special-tokens up to 1"):
        CorpusTokenizer.load(tmp_path)


def test_a_vocabulary_may_lack_bytes_that_text_rarely_has() -> None:
    data = json.loads(TOKENIZER.files()["tokenizer.json"])
    letters = letter_of_byte()
    for byte in (0x04, 0xC0, 0xF5):
        # another entry takes the id: a gap would move the ids of the special tokens
        data["model"]["vocab"][f"zz{letters[ord('a')] * (byte % 7 + 3)}"] = data["model"]["vocab"].pop(letters[byte])
    tokenizer = CorpusTokenizer(json.dumps(data).encode(), SPECIAL, name="given")
    assert tokenizer.encode("plain text") == tokenizer.encode_reference("plain text")
    assert tokenizer.check_parity(["a", "b"]) > 2
    with pytest.raises(UsageError, match="no entry for the byte 0x04"):
        tokenizer.encode("a\x04b")
