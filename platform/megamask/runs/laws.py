"""Versions of the laws of order and noise that this program trains under."""

from __future__ import annotations

LAWS = {"order": 1, "noise": 1, "weights": 1, "likelihood": 1}
"""Of every run when it begins, and of one that never leaves out samples."""

SKIPPING_LAWS = {**LAWS, "order": 2}
"""Of what a run writes after a rewind that leaves out samples (skips.json)."""

KNOWN_LAWS = (LAWS, SKIPPING_LAWS)
