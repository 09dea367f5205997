"""Secrets by reference: a config contains the name of an environment variable, never its value."""

from __future__ import annotations

import os
import re
from urllib.parse import parse_qsl, urlsplit

from megamask.errors import UsageError

_REFERENCE_PREFIX = "env:"
_SHOWN_CHARACTERS = 200
_REFERENCE = re.compile(r"env:[A-Za-z_][A-Za-z0-9_]*")
SECRET_NAME = re.compile(
    r"token|passw(or)?d|secret|credential|signature|^sig$|^auth|api[_-]?key|access[_-]?key|^key$", re.IGNORECASE
)
# Repetitions are bounded, so that a long text of nearly such shapes costs no more than its length.
SCHEME = r"(?<![A-Za-z0-9+.-])[A-Za-z][A-Za-z0-9+.-]{0,30}://"
_URI = re.compile(SCHEME + r"[^\s'\"]+")
# A password may hold what ends a host name: what follows the first colon, unless it is a port, is a password.
_BEFORE_PASSWORD = rf"(?P<scheme>{SCHEME})(?P<user>[^\s/@?#:]{{0,200}}:(?![/\s])(?!\d{{1,5}}(?:[/?#\s]|$))"
LOOSE_USERINFO = re.compile(_BEFORE_PASSWORD + r"[^@\s]{0,500})@")
_SPACED_USERINFO = re.compile(_BEFORE_PASSWORD + r"[^@\n]{0,500})@")
# Credentials that issuers have given a shape of their own.
TOKEN_SHAPES = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|sk-(?:proj|ant|svcacct|admin)-[\w-]{20,}|sk-[A-Za-z0-9]{32,}|xox[abprs]-[\w-]{10,}|AIza[\w-]{35}"
    r"|(?:AKIA|ASIA)[0-9A-Z]{16}(?![0-9A-Z])|dapi[0-9a-f]{32}|npm_[A-Za-z0-9]{36}|pypi-[\w-]{40,}"
    r"|eyJ[\w-]{8,4000}\.[\w-]{8,}\.[\w-]*)|-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----"
)


def carries_credential(text: str) -> bool:
    """Return whether a text shows a credential: a URI with a user part before '@', with a query or fragment field
    of that kind, or anything that has the shape of a known issuer's tokens.

    A bare user name counts too: many services take a token in its place.
    """
    if TOKEN_SHAPES.search(text) or _SPACED_USERINFO.search(text):
        return True
    return any(_uri_carries_credential(match[0]) for match in _URI.finditer(text))


def _uri_carries_credential(uri: str) -> bool:
    try:
        parts = urlsplit(uri)
        fields = [*parse_qsl(parts.query, keep_blank_values=True), *parse_qsl(parts.fragment)]
    except ValueError:  # what cannot be read cannot be cleared
        return "@" in uri
    return "@" in parts.netloc or any(SECRET_NAME.search(name) and value for name, value in fields)


def shown(value: object) -> str:
    """A value for an error message; a string that carries a credential shows as ***, a long one by its beginning."""
    if carries_credential(text := str(value)):
        return "***"
    if len(text) > _SHOWN_CHARACTERS:
        return f"{text[:_SHOWN_CHARACTERS]!r}... ({len(text)} characters)"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value)


def is_reference(value: str) -> bool:
    """Return whether a string names an environment variable, as env:NAME."""
    return value.startswith(_REFERENCE_PREFIX)


def check_no_secret(key: str, value: str, where: str) -> None:
    """Refuse a URI that carries a credential and a reference without a proper name; the credential is not shown.

    Raises:
        UsageError: names the key and where it was given.
    """
    if carries_credential(value):
        raise UsageError(
            f"{key} carries a credential ({where}); its value is not shown. Nothing was started.",
            hint=f"put the complete value into an environment variable and set {key}=env:NAME",
        )


def check_reference(key: str, value: str, where: str) -> None:
    """Refuse env: without a proper variable name behind it.

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
