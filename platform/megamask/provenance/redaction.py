"""One redactor for everything that leaves the process as text: logs, errors, config dumps, tags.

It knows the shapes of credentials, not the credentials: a secret that looks like a plain word is not found. Secrets
belong into the environment and are given as `env:NAME`.
"""

from __future__ import annotations

import re

MASK = "***"

_USERINFO = re.compile(r"(?P<scheme>\b[A-Za-z][A-Za-z0-9+.-]*://)(?P<user>[^\s/@?#'\"]+)@")
_NAMED = re.compile(
    r"(?P<name>\b[\w.-]*(?:password|passwd|secret|token|api[_-]?key|access[_-]?key|credential|signature|\bsig)[\w.-]*"
    r"[\"']?\s*[=:]\s*[\"']?)(?P<value>[^\s&\"',;}{)\]]+)",
    re.IGNORECASE,
)
_BEARER = re.compile(r"(?P<name>\b(?:bearer|basic)\s+)[A-Za-z0-9+/_.~=-]{8,}", re.IGNORECASE)
_KNOWN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|sk-[\w-]{16,}"
    r"|AKIA[0-9A-Z]{16}|ASIA[0-9A-Z]{16}|dapi[0-9a-f]{32}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)"
)
# Names that only speak of tokens of text, or of where a secret stands.
_HARMLESS = re.compile(
    r"(?:num|consumed|processed|masked|eligible|max|global_batch)[\w.]*_tokens?|tokens?_per|[\w.]*token_id|tokenizer"
    r"|per_token|special_token|mask_token|token_bytes",
    re.IGNORECASE,
)


def redact(text: str) -> str:
    """The text with every credential that it shows replaced by ***; `env:NAME` references stay."""
    text = _USERINFO.sub(rf"\g<scheme>{MASK}@", text)
    text = _BEARER.sub(rf"\g<name>{MASK}", text)
    text = _KNOWN.sub(MASK, text)
    return _NAMED.sub(_mask_value, text)


def _mask_value(match: re.Match[str]) -> str:
    if match["value"].startswith(("env:", MASK)) or _HARMLESS.search(match["name"]):
        return match[0]
    return match["name"] + MASK
