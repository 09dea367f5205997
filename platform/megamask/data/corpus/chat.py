"""Conversations as segments, prompts and answers, rendered by a chat template.

The template is Jinja as Hugging Face tokenizers hold it. A segment of an answer is what the template adds to the
conversation so far with its generation prompt: the assistant's text and what ends the turn. Markers of the template may
become special tokens; the text of a message never does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megamask.data.corpus.inputs import NOTHING_WRITTEN
from megamask.data.tokenizer import CorpusTokenizer
from megamask.errors import DataIntegrityError, UsageError

PLAIN_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""Where no template is given; its markers are ordinary text."""

ASSISTANT = "assistant"
Message = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of a rendered conversation.

    Args:
        is_content: text of a message, which never becomes a special token; otherwise the template's own.
        is_answer: what the model must write.
    """

    text: str
    is_content: bool
    is_answer: bool


def chat_template(path: str | None) -> str:
    """The text of a template: of a Jinja file, or under chat_template of a tokenizer_config.json; None: the plain one.

    Raises:
        UsageError: it cannot be read, or holds no template.
    """
    if path is None:
        return PLAIN_TEMPLATE
    file = Path(path).expanduser()
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix != ".json":
            return text
        template = json.loads(text)["chat_template"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"corpus.chat_template: {path} holds no chat template ({error!r}). {NOTHING_WRITTEN}",
            hint="give a Jinja file, or a tokenizer_config.json with the key chat_template",
        ) from error
    if not isinstance(template, str):
        raise UsageError(f"corpus.chat_template: chat_template of {path} is not one template. {NOTHING_WRITTEN}")
    return template


def conversation(value: Any, where: str) -> str:
    """A list of messages as the text of a document: JSON with their roles and contents.

    Raises:
        DataIntegrityError: not a list of {"role": ..., "content": ...} with an answer in it.
    """
    is_valid = (
        isinstance(value, list)
        and value
        and all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in value
        )
    )
    if not is_valid or all(message["role"] != ASSISTANT for message in value):
        raise DataIntegrityError(
            f"{where}: the messages are not a list of objects with role and content, one of them of the role "
            f"{ASSISTANT}. {NOTHING_WRITTEN}",
            hint="repair the input or take it out of corpus.inputs (corpus.exclude)",
        )
    plain = [{"role": message["role"], "content": message["content"]} for message in value]
    return json.dumps(plain, ensure_ascii=False)


class ChatTemplate:
    """Conversations as text.

    Args:
        template: Jinja.
    """

    def __init__(self, template: str) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        try:
            self._template = environment.from_string(template)
        except TemplateError as error:
            raise UsageError(f"corpus.chat_template is not a Jinja template: {error}. {NOTHING_WRITTEN}") from error

    def text(self, document: str, where: str) -> str:
        """The rendered text of a document of `conversation`."""
        return "".join(piece.text for piece in self.pieces(json.loads(document), where))

    def pieces(self, messages: Sequence[Message], where: str) -> list[Piece]:
        """The rendered conversation in parts."""
        rendered, pieces = "", list[Piece]()
        pending = list[str]()  # contents of messages that are not rendered yet
        for number, message in enumerate(messages):
            pending.append(message["content"])
            if message["role"] != ASSISTANT:
                continue
            answer = pending.pop()
            prompt = self._render(messages[:number], where, add_generation_prompt=True)
            complete = self._render(messages[: number + 1], where, add_generation_prompt=False)
            if not (prompt.startswith(rendered) and complete.startswith(prompt)):
                raise UsageError(
                    f"{where}: the chat template does not write the answer of message {number} behind its generation "
                    f"prompt, so that answers cannot be found. {NOTHING_WRITTEN}"
                )
            pieces += _split(prompt[len(rendered) :], pending, where, is_answer=False)
            pieces += _split(complete[len(prompt) :], [answer], where, is_answer=True)
            rendered, pending = complete, []
        if pending:
            rest = self._render(messages, where, add_generation_prompt=False)
            pieces += _split(rest[len(rendered) :], pending, where, is_answer=False)
        return pieces

    def _render(self, messages: Sequence[Message], where: str, *, add_generation_prompt: bool) -> str:
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, bos_token="", eos_token=""
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise UsageError(f"{where}: the chat template refuses the messages: {error}. {NOTHING_WRITTEN}") from error


class ChatEncoder:
    """Encoder of conversations.

    Args:
        template: Jinja.
        tokenizer: of the corpus.
    """

    def __init__(self, template: str, tokenizer: CorpusTokenizer) -> None:
        self._template, self._tokenizer = ChatTemplate(template), tokenizer

    def segments(self, text: str, where: str) -> list[tuple[bool, npt.NDArray[np.int64]]]:
        """(is answer, ids) of each segment of a document of `conversation`, none empty, the end of document last.

        The end of document belongs to the last segment: after an answer it is what the model must write to stop.

        Raises:
            UsageError: the template cannot be used with these messages or this tokenizer.
        """
        tokenizer = self._tokenizer
        found: list[tuple[bool, list[int]]] = []
        for piece in self._template.pieces(json.loads(text), where):
            ids = tokenizer.encode(piece.text) if piece.is_content else tokenizer.encode_template(piece.text)
            if not {tokenizer.eod_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id}.isdisjoint(ids):
                raise UsageError(
                    f"{where}: the chat template writes the end-of-document, padding or mask token, which mean "
                    f"something else in a corpus. {NOTHING_WRITTEN}",
                    hint="choose another corpus.tokenizer.eod_token, pad_token or mask_token",
                )
            if found and found[-1][0] == piece.is_answer:
                found[-1][1].extend(ids)
            elif ids:
                found.append((piece.is_answer, ids))
        found[-1][1].append(tokenizer.eod_token_id)
        return [(is_answer, np.array(ids, dtype=np.int64)) for is_answer, ids in found]


def _split(text: str, contents: Sequence[str], where: str, *, is_answer: bool) -> list[Piece]:
    """Parts of the template and of messages, in order; a template may strip a message's white space."""
    pieces, cursor = list[Piece](), 0
    for content in contents:
        shown = content if text.find(content, cursor) >= 0 else content.strip()
        start = text.find(shown, cursor)
        if start < 0:
            raise UsageError(f"{where}: the chat template changes the text of a message. {NOTHING_WRITTEN}")
        pieces.append(Piece(text=text[cursor:start], is_content=False, is_answer=is_answer))
        pieces.append(Piece(text=shown, is_content=True, is_answer=is_answer))
        cursor = start + len(shown)
    pieces.append(Piece(text=text[cursor:], is_content=False, is_answer=is_answer))
    return [piece for piece in pieces if piece.text]


def _refuse(message: str) -> None:
    raise TemplateError(message)
