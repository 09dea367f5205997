"""Secrets never stand in a config: only the name of the environment variable that holds one does."""

from __future__ import annotations

import os
import re
from urllib.parse import parse_qsl, urlsplit

from megamask.errors import UsageError

_REFERENCE_PREFIX = "env:"
_REFERENCE = re.compile(r"env:[A-Za-z_][A-Za-z0-9_]*")
_SECRET_NAME = re.compile(
    r"token|passw(or)?d|secret|credential|signature|^sig$|^auth|api[_-]?key|access[_-]?key|^key$", re.IGNORECASE
)
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"]+")


def carries_credential(text: str) -> bool:
    """Whether a URI in the text shows a credential: a user part before '@', or a query or fragment field of that kind.

    A bare user name counts too: many services take a token in its place.
    """
    return any(_uri_carries_credential(match[0]) for match in _URI.finditer(text))


def _uri_carries_credential(uri: str) -> bool:
    try:
        parts = urlsplit(uri)
        fields = [*parse_qsl(parts.query, keep_blank_values=True), *parse_qsl(parts.fragment)]
    except ValueError:  # what cannot be read cannot be cleared
        return "@" in uri
    return "@" in parts.netloc or any(_SECRET_NAME.search(name) and value for name, value in fields)


def shown(value: object) -> str:
    """A value for an error message; a string that carries a credential shows as ***."""
    if carries_credential(str(value)):
        return "***"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value)


def is_reference(value: str) -> bool:
    """Whether a string names an environment variable, as env:NAME."""
    return value.startswith(_REFERENCE_PREFIX)


def check_no_secret(key: str, value: str, where: str) -> None:
    """Refuses a URI that carries a credential and a reference without a proper name; the credential is not shown.

    Raises:
        UsageError: names the key and where it was given.
    """
    if carries_credential(value):
        raise UsageError(
            f"{key} carries a credential ({where}); its value is not shown. Nothing was started.",
            hint=f"put the whole URI into an environment variable and set {key}=env:NAME",
        )


def check_reference(key: str, value: str, where: str) -> None:
    """Refuses env: without a proper variable name behind it.

    Raises:
        UsageError: names the key and where it was given.
    """
    if is_reference(value) and not _REFERENCE.fullmatch(value):
        raise UsageError(
            f"{key} is not a reference of the form env:NAME ({where}); NAME holds letters, digits and '_'. "
            "Nothing was started."
        )


def resolve_secret(key: str, value: str) -> str:
    """The value to use: what the variable holds for env:NAME, else the value itself. Never store what this returns.

    Raises:
        UsageError: the variable is not set, or empty.
    """
    if not is_reference(value):
        return value
    name = value.removeprefix(_REFERENCE_PREFIX)
    if not (content := os.environ.get(name)):
        raise UsageError(
            f"{key} is {value}, but the environment variable {name} is not set. Nothing was started.",
            hint=f"export {name}=..., or change {key}",
        )
    return content
