"""Versions of the laws of order and noise that this program trains under."""

from __future__ import annotations

LAWS = {"order": 1, "noise": 1, "weights": 1, "likelihood": 1}
