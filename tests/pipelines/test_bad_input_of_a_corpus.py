"""Wrong input of `megamask prepare` is refused, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.refusals import Refuse, prepare, truncate


def write_tokenizers(folder: Path) -> None:
    import tokenizers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    words.save(str(folder / "words.json"))
    spaces = tokenizers.Tokenizer(tokenizers.models.BPE())
    spaces.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    spaces.save(str(folder / "spaces.json"))


@pytest.mark.promise("an impossible layout or length is refused, with the possible values")
@pytest.mark.parametrize(
    ("overrides", "code", "words"),
    [
        (["corpus.inputs=[empty.txt]"], 2, ("the corpus is empty", "no text", "corpus.inputs")),
        (["corpus.inputs=['*.nope']"], 2, ("corpus.inputs: *.nope matches no file",)),
        (["corpus.inputs=[*.txt]"], 2, ("corpus.inputs", "quote", "'corpus.inputs=[\"*.txt\"]'")),
        (["corpus.inputs=[nope.txt]"], 2, ("corpus.inputs: nope.txt matches no file",)),
        (["corpus.inputs=[]"], 2, ("corpus.inputs", "at least one")),
        (["corpus.inputs=text.txt"], 2, ("corpus.inputs is 'text.txt'", "a list")),
        (["corpus.inputs=[latin.txt]"], 64, ("latin.txt", "byte 3 (0xe9)", "not UTF-8")),
        (["corpus.sequence_length=8"], 2, ("corpus.sequence_length is 8", "an integer >= 16")),
        (["corpus.sequence_length=65"], 2, ("corpus.sequence_length is 65", "a multiple of 16", "64 or 80")),
        (["corpus.validation_fraction=1"], 2, ("corpus.validation_fraction is 1.0", "< 1")),
        (["corpus.validation_fraction=0.5"], 2, ("corpus.validation_fraction is 0.5", "a single document")),
        (["corpus.tokenizer.vocab_size=10"], 2, ("corpus.tokenizer.vocab_size is 10", ">= 259")),
        (["corpus.tokenizer.pad_token=<|mask|>"], 2, ("corpus.tokenizer.", "differ")),
        (["corpus.output_dir=text.txt"], 2, ("corpus.output_dir", "text.txt exists and is not a corpus")),
        (["corpus.output_dir=text.txt/deep/er"], 2, ("corpus.output_dir", "/place/text.txt, which is not a folder")),
        (["corpus.output_dir=folder"], 2, ("corpus.output_dir", "is not a corpus", "not touched")),
        ([f"corpus.output_dir={'x' * 300}"], 2, ("corpus.output_dir", "File name too long")),
        (["corpus.output_dir="], 2, ("corpus.output_dir", "no folder or file")),
    ],
)
def test_corpus_that_cannot_be_made_is_refused(
    refuse: Refuse, overrides: list[str], code: int, words: tuple[str, ...]
) -> None:
    refuse(*prepare(*overrides), code=code, says=words)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nope.json", ("corpus.tokenizer.path: nope.json cannot be read",)),
        ("folder", ("the folder folder holds no tokenizer files", "tokenizer.json")),
        ("text.txt", ("text.txt: not JSON", "byte-level BPE", "corpus.tokenizer.path")),
        ("words.json", ("words.json", "WordLevel", "byte-level BPE")),
        ("spaces.json", ("spaces.json", "does not end with ByteLevel")),
    ],
)
def test_tokenizer_that_cannot_be_served_is_refused(
    refuse: Refuse, place: Path, path: str, words: tuple[str, ...]
) -> None:
    write_tokenizers(place)
    refuse(*prepare("corpus.tokenizer.vocab_size=null", f"corpus.tokenizer.path={path}"), says=words)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("corpus.tokenizer.path=x.json", "both are set"),
        ("corpus.tokenizer.vocab_size=null", "neither is set"),
    ],
)
def test_tokenizer_is_trained_or_loaded_and_not_both(refuse: Refuse, override: str, words: str) -> None:
    refuse(*prepare(override), says=(words, "corpus.tokenizer.vocab_size", "corpus.tokenizer.path", "exactly one"))


def test_another_corpus_is_not_overwritten(refuse: Refuse, small_corpus: Path) -> None:
    refuse(*prepare(f"corpus.output_dir={small_corpus}"), says=("holds another corpus", "inputs", "not touched"))


@pytest.mark.parametrize(
    ("lines", "words"),
    [('{"text": "a"}\n{"txt": "b"}\n', ("x.jsonl:2", "'text'")), ("{}}\n", ("x.jsonl:1", "not a JSON value"))],
)
def test_damaged_line_of_an_input_ends_with_64(refuse: Refuse, place: Path, lines: str, words: tuple[str, ...]) -> None:
    (place / "x.jsonl").write_text(lines)
    refuse(*prepare("corpus.inputs=[x.jsonl]"), code=64, says=words)


@pytest.mark.parametrize("name", ["manifest.json", "shards/train-000000.tar"])
def test_preparing_over_a_damaged_corpus_ends_with_64(
    refuse: Refuse, small_corpus: Path, damaged: Path, name: str
) -> None:
    truncate(damaged / name)
    refuse(
        *prepare(
            f"corpus.inputs=['{small_corpus.parent}/texts/*.txt']",
            f"corpus.output_dir={damaged}",
            "corpus.tokenizer.vocab_size=300",
            "corpus.sequence_length=64",
            "corpus.validation_fraction=0.1",
            "corpus.rows_per_block=16",
        ),
        code=64,
        says=(name, "again"),
    )


@pytest.mark.promise("preparing onto a full disk ends with 74 and leaves nothing")
@pytest.mark.promise("a full storage ends with 74 and exposes nothing half-written")
@pytest.mark.multiprocess
def test_preparing_onto_a_full_storage_ends_with_74_and_leaves_nothing(
    refuse_outside: Refuse, small_corpus: Path
) -> None:
    arguments = prepare(f"corpus.inputs=['{small_corpus.parent}/texts/*.txt']", "corpus.tokenizer.vocab_size=300")
    says = ("new/corpus", "file-size limit", "Nothing was published", "free space")
    refuse_outside(*arguments, code=74, says=says, file_bytes=20_000)
