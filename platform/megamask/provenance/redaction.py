"""One redactor for everything that leaves the process as text: logs, errors, config dumps, journal, tags.

It masks credential patterns and registered secrets: the values of `env:NAME` settings. A secret that looks like a plain
word and was not registered is not found. Secrets belong into the environment and are given as `env:NAME`.
"""

from __future__ import annotations

import base64
import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from megamask.config.secrets import LOOSE_USERINFO, SCHEME, SECRET_NAME, TOKEN_SHAPES, is_reference
from megamask.errors import MegamaskError

MASK = "***"

_USERINFO = re.compile(rf"(?P<scheme>{SCHEME})(?P<user>[^\s/?#'\"]+)@")
_NAMED = re.compile(
    r"(?P<name>(?:password|passwd|secret|token|api[_-]?key|access[_-]?key|credential|signature|\bsig)[\w.-]{0,64}"
    r"[\"']?\s{0,8}[=:]\s{0,8}[\"']?)(?P<value>[^\s&\"',;}{)\]]+)",
    re.IGNORECASE,
)
_END_OF_NAME = re.compile(r"[\w.-]+$")
_BEARER = re.compile(r"(?P<name>\b(?:bearer|basic)\s+)[A-Za-z0-9+/_.~=-]{8,}", re.IGNORECASE)
# Names that refer to tokens of text, or to the location of a secret.
_HARMLESS = re.compile(
    r"(?:num|consumed|processed|masked|eligible|max|global_batch)[\w.]*_tokens?|tokens?_per|[\w.]*token_id|tokenizer"
    r"|per_token|special_token|mask_token|token_bytes|(?:^|[0-9.])tokens\b",
    re.IGNORECASE,
)
# Variables that hold a secret by their name, for any reader (MLflow, an object store's client).
_SECRET_VARIABLE = re.compile(r"(?:^|_)(?:TOKEN|PASSWORD|PASSWD|SECRET|API_?KEY|ACCESS_KEY|SESSION_KEY|PRIVATE_KEY)$")
_NO_SECRETS = frozenset({"MEGAMASK_LAUNCH_TOKEN"})  # names a start of a job; claims and folders carry it
# A shorter word would be masked inside other words; no secret is that short.
_SHORTEST = 4
_SHORTEST_VARIABLE = 8

_registered: set[str] = set()
_longest_first: tuple[str, ...] = ()


def register_secret(value: str) -> None:
    """Mask a value, and the parts of it that are secret where it is a URI, in every text from now on.

    Words of fewer than 4 characters are not taken.
    """
    global _longest_first  # noqa: PLW0603  one process has one set of secrets
    forms = {form for part in (value, *_secret_parts(value)) for form in _written_forms(part)}
    _registered.update(form for form in forms if len(form) >= _SHORTEST and form != MASK)
    _longest_first = tuple(sorted(_registered, key=lambda form: (-len(form), form)))


def register_references(config: Any) -> None:
    """Register the values of the `env:NAME` settings of a config; unset variables are skipped.

    Args:
        config: a settings tree (a dataclass), as `megamask.config.load` makes them.
    """
    for text in _strings(dataclasses.asdict(config)):
        if is_reference(text) and (content := os.environ.get(text.partition(":")[2])):
            register_secret(content)


def register_environment() -> None:
    """Register the values of environment variables that are secrets by their name."""
    for name, value in os.environ.items():
        is_secret = name not in _NO_SECRETS and _SECRET_VARIABLE.search(name.upper())
        if is_secret and len(value) >= _SHORTEST_VARIABLE:
            register_secret(value)


def forget_secrets() -> None:
    """Forget all registered secrets; for tests, which are many programs in one process."""
    global _longest_first  # noqa: PLW0603
    _registered.clear()
    _longest_first = ()


def redact(text: str) -> str:
    """The text with every credential that it shows replaced by ***; `env:NAME` references stay."""
    for literal in _longest_first:
        text = text.replace(literal, MASK)
    text = _USERINFO.sub(rf"\g<scheme>{MASK}@", text)
    text = LOOSE_USERINFO.sub(rf"\g<scheme>{MASK}@", text)
    text = _BEARER.sub(rf"\g<name>{MASK}", text)
    text = TOKEN_SHAPES.sub(MASK, text)
    return _NAMED.sub(_mask_value, text)


def redact_values(value: Any) -> Any:
    """A JSON value with every string in it redacted; names in objects stay, so that readers still find them."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {name: redact_values(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact_values(item) for item in value]
    return value


def redacted(error: MegamaskError) -> MegamaskError:
    """The same error object, with its message, hint and details redacted."""
    error.message = redact(error.message)
    error.hint = None if error.hint is None else redact(error.hint)
    error.details = redact_values(error.details)
    error.args = (error.message,)
    return error


def reason_of(error: BaseException) -> str:
    """Return the text of an error that ended a run, for its records, redacted."""
    return redact(error.message if isinstance(error, MegamaskError) else f"{type(error).__name__}: {error}")


def _mask_value(match: re.Match[str]) -> str:
    before = _END_OF_NAME.search(match.string, max(0, match.start() - 64), match.start())
    name = (before[0] if before else "") + match["name"]
    if match["value"].startswith(("env:", MASK)) or _HARMLESS.search(name):
        return match[0]
    return match["name"] + MASK


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _secret_parts(value: str) -> set[str]:
    """Of a URI: its password (or its user where there is none), both as a Basic header has them, and its query."""
    if "://" not in value:
        return set()
    loose = LOOSE_USERINFO.search(value)
    try:
        parts = urlsplit(value)
        fields = [*parse_qsl(parts.query), *parse_qsl(parts.fragment)]
        userinfo = parts.netloc.rpartition("@")[0]
    except ValueError:
        fields, userinfo = [], ""
    userinfo = userinfo or (loose["user"] if loose else "")
    found = {text for name, text in fields if SECRET_NAME.search(name) or len(text) >= _SHORTEST_VARIABLE}
    if userinfo:
        user, _, password = userinfo.partition(":")
        pair = f"{unquote(user)}:{unquote(password)}"
        found |= {userinfo, password or user, base64.b64encode(pair.encode()).decode()}
    return found


def _written_forms(text: str) -> set[str]:
    """The ways in which libraries write a text: as it is, percent-encoded, decoded, and escaped as in a repr."""
    return {text, quote(text, safe=""), quote(text), unquote(text), text.encode("unicode_escape").decode("ascii")}
