"""Corpora of conversations: which tokens are answers, and that only those are noised and scored."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megamask.config.schema.corpus import CorpusConfig, TokenizerConfig
from megamask.config.schema.data import DataConfig
from megamask.data.corpus.prepare import build
from megamask.data.loader import Loader
from megamask.data.manifest import Manifest
from megamask.data.roles import answered, without_roles
from megamask.data.tokenizer import TOKENIZER_DIR, CorpusTokenizer
from megamask.data.verify import verify_corpus
from megamask.errors import DataIntegrityError, UsageError
from megamask.evaluation.rows import split_rows
from megamask.models.vocabulary import Vocabulary
from megamask.objectives.autoregressive import AutoregressiveObjective
from megamask.objectives.base import Samples
from megamask.objectives.block import BlockObjective
from megamask.objectives.masked import MaskedObjective
from megamask.objectives.uniform import UniformObjective

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def turns(number: int) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": "be short <|im_end|>"},
        {"role": "user", "content": f"what is {number} plus {number}? "},
        {"role": "assistant", "content": f"it is {2 * number}."},
        {"role": "user", "content": "and now?"},
        {"role": "assistant", "content": f"still {2 * number}, <|mask|>."},
    ]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    lines = [json.dumps({"messages": turns(number)}) for number in range(60)]
    (folder / "chat.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "template.jinja").write_text(CHATML)
    build(config(folder))
    return folder / "corpus"


def config(folder: Path, **changes) -> CorpusConfig:
    settings = {
        "inputs": [{"path": str(folder / "chat.jsonl"), "format": "messages"}],
        "output_dir": str(folder / "corpus"),
        "sequence_length": 64,
        "validation_fraction": 0.1,
        "chat_template": str(folder / "template.jinja"),
        "tokenizer": TokenizerConfig(vocab_size=300),
    }
    return CorpusConfig(**(settings | changes))


def loader(corpus: Path, score: str = "answers") -> Loader:
    return Loader({"chat": str(corpus)}, DataConfig(corpora={"chat": str(corpus)}, score=score), 64)


@pytest.mark.promise("a tokenizer trained on conversations learns from the text that they are rendered to")
def test_tokenizer_is_trained_on_the_rendered_text(corpus: Path) -> None:
    tokenizer = CorpusTokenizer.load(corpus / TOKENIZER_DIR)
    learned = [tokenizer.decode_bytes([token]) for token in range(tokenizer.vocab_size)]
    learned = [token for token in learned if len(token) > 1 and not token.startswith(b"<|")]
    assert not [token for token in learned if b'"' in token or b"{" in token], "no syntax of JSON"
    assert {b"start", b"|>"} <= set(learned), "the template's marks"


@pytest.mark.promise("a split of conversations is evaluated on what training scores")
def test_split_is_scored_on_answers_where_training_was(corpus: Path) -> None:
    manifest = Manifest.load(corpus)
    given = {"tokenizer_digest": manifest.tokenizer_digest, "sequence_length": 64, "rows": None}
    tokens, is_eligible = split_rows(corpus, manifest, "validation", score="answers", **given)
    same, every = split_rows(corpus, manifest, "validation", **given)
    assert torch.equal(tokens, same)
    assert torch.equal(every, tokens != manifest.pad_token_id)
    tokenizer = CorpusTokenizer.load(corpus / TOKENIZER_DIR)
    scored, rest = (tokenizer.decode_bytes(tokens[chosen].tolist()) for chosen in (is_eligible, every & ~is_eligible))
    assert b"it is" in scored and b"still" in scored
    assert b"what is" in rest and b"what is" not in scored
    assert b"it is" not in rest and not (is_eligible & ~every).any()


@pytest.mark.promise("fine-tuning noises and scores answers only; padding is never scored")
def test_answers_are_what_the_template_writes_behind_its_generation_prompt(corpus: Path) -> None:
    with loader(corpus) as answers:
        rows = [answers.read("chat", row) for row in range(answers.num_rows)]
        tokens = np.concatenate([row.tokens for row in rows]).astype(np.int64)
        is_answer = np.concatenate([answered(row.documents, 64) for row in rows])
        is_answer &= tokens != answers.manifest.pad_token_id  # the last row is filled behind its last answer
        tokenizer, manifest = answers.tokenizer, answers.manifest
        runs = np.flatnonzero(np.diff(np.concatenate([[0], is_answer.astype(np.int8), [0]])))
        texts = [tokenizer.decode(tokens[start:stop].tolist()) for start, stop in runs.reshape(-1, 2)]
        eod = tokenizer.decode([manifest.eod_token_id])
        assert len(texts) == 2 * manifest.split("train").num_documents
        assert all(text.startswith("it is ") and text.endswith(".<|im_end|>\n") for text in texts[::2])
        # the last answer ends the document, and the model must learn to write that end
        assert all(text.startswith("still ") and text.endswith(f", <|mask|>.<|im_end|>\n{eod}") for text in texts[1::2])
        assert manifest.mask_token_id not in tokens  # text of a message never becomes a special token
        eligible = answers.eligible(rows).flatten().numpy()
        assert np.array_equal(eligible, is_answer & (tokens != manifest.pad_token_id))
    with loader(corpus, "all") as everything:
        rows = [everything.read("chat", row) for row in range(everything.num_rows)]
        assert int(everything.eligible(rows).sum()) == everything.manifest.split("train").num_tokens


def test_corpus_of_conversations_verifies_and_its_list_hides_roles(corpus: Path) -> None:
    verify_corpus(corpus)
    docs = np.array([[0, 0, 3], [0, 9, -4], [0, 20, 3], [0, 30, -5], [1, 0, -5]])
    assert without_roles(docs).tolist() == [[0, 0, 3], [0, 30, 4], [1, 0, 4]]


def objectives(vocabulary: Vocabulary) -> dict:
    options = {"vocabulary": vocabulary, "mask_logit": "excluded"}
    return {
        "masked": MaskedObjective(noise_schedule="linear", complementary=True, **options),
        "block": BlockObjective(block_size=8, clean_half="block_causal", **options),
        "autoregressive": AutoregressiveObjective(**options),
        "uniform": UniformObjective(noise_schedule="linear", **options),
    }


@pytest.mark.promise("fine-tuning noises and scores answers only; padding is never scored")
@pytest.mark.parametrize("name", ["masked", "block", "autoregressive", "uniform"])
def test_no_objective_noises_or_scores_a_prompt_or_padding(corpus: Path, name: str) -> None:
    with loader(corpus) as answers:
        manifest, count = answers.manifest, 8
        batch = answers.batch(0, count, range(count))
    vocabulary = Vocabulary(
        vocab_size=manifest.vocab_size,
        padded_vocab_size=manifest.vocab_size,
        mask_token_id=manifest.mask_token_id,
        eod_token_id=manifest.eod_token_id,
        pad_token_id=manifest.pad_token_id,
    )
    given = Samples(
        tokens=batch.tokens.to(torch.int64),
        is_eligible=batch.is_eligible,
        sample_index=batch.sample_index,
        batch_position=list(range(count)),
        global_batch_size=count,
    )
    rows = objectives(vocabulary)[name].rows(given, 1, (3, 0))
    views = len(rows.inputs) // count
    prompt = ~batch.is_eligible.repeat_interleave(views, dim=0)
    read = rows.inputs[:, :64]
    assert torch.equal(read[prompt], batch.tokens.to(torch.int64).repeat_interleave(views, dim=0)[prompt])
    scored = rows.is_scored[:, :64].roll(1, dims=1) if name == "autoregressive" else rows.is_scored[:, :64]
    assert bool(scored.any()) and not (scored & prompt).any()
    assert not (rows.targets[rows.is_scored] == manifest.pad_token_id).any()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"messages": [{"role": "user", "content": "no answer"}]}, "one of them of the role assistant"),
        ({"messages": "text"}, "not a list of objects with role and content"),
        ({"other": []}, "no key 'messages'"),
    ],
)
def test_lines_that_are_no_conversation_are_refused_with_their_place(tmp_path: Path, line: dict, words: str) -> None:
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns(1)}) + "\n" + json.dumps(line) + "\n")
    with pytest.raises(DataIntegrityError, match=words) as caught:
        build(config(tmp_path, chat_template=None))
    assert "chat.jsonl:2" in caught.value.message
    assert not (tmp_path / "corpus").exists()


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}{{ m.content }}", "not a Jinja template"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "changes the text of a message"),
        ("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}", "answers cannot be found"),
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}", "end-of-document, padding or mask token"),
    ],
)
def test_templates_that_cannot_be_used_are_refused(tmp_path: Path, template: str, words: str) -> None:
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps({"messages": turns(n)}) for n in range(3)) + "\n")
    (tmp_path / "template.jinja").write_text(template)
    with pytest.raises(UsageError, match=words):
        build(config(tmp_path))
    assert not (tmp_path / "corpus").exists()


def test_answers_of_a_corpus_without_conversations_are_refused(small_corpus: Path) -> None:
    with pytest.raises(UsageError, match="holds no conversations"):
        loader(small_corpus)
