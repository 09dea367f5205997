"""The page that tools/parity_matrix.py writes from its results: docs/parity.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Result = dict[str, Any]

_HEAD = """# Parity: layouts beside one process

Written by `tools/parity_matrix.py`{when}.

A cell is the largest relative difference over {steps} steps to one
process: loss / gradient norm. In every cell these are equal, number for number: eligible, scored and masked tokens,
masks by noise level, the digest of the samples that the ranks took (`batch_digest`) and of what they read
(`content_digest`); and all ranks report the same. tp, pp, vpp, cp, dp, ep, etp: ranks on the axes; sp: sequence
parallelism; balanced: `layout.pipeline_split`. `-`: not run. R: refused before a process starts, for the reason below.
OUT: beyond the tolerance. UNEQUAL: a number or a rank differs. FAILED: the case ended with an error.
"""


def page(
    results: Mapping[str, Result],
    layouts: list[str],
    kinds: list[str],
    *,
    tolerances: Mapping[str, tuple[float, float]],
    bases: Mapping[str, str],
    num_steps: int,
) -> str:
    """The page of the results.

    Args:
        results: by `kind/layout` and `restart/layout`; "about" records when and with what they were made.
        layouts: names of the rows.
        kinds: names of the columns; one without results is left out.
        tolerances: of each kind: loss, gradient norm.
        bases: the kind that changes nothing but memory and speed of which other one.
    """
    kinds = [kind for kind in kinds if any(key.startswith(f"{kind}/") for key in results)]
    about = results.get("about", {})
    when = f" on {about['date']} with {about['versions']}" if about else ""
    blocks = [
        _HEAD.format(when=when, steps=num_steps),
        _tolerances(kinds, tolerances),
        _table(results, layouts, kinds),
        _summary(results, layouts, kinds, bases),
        _refusals(results, layouts, kinds),
        _restarts({key.split("/")[1]: result for key, result in results.items() if key.startswith("restart/")}),
    ]
    return "\n".join(block for block in blocks if block)


def _tolerances(kinds: list[str], tolerances: Mapping[str, tuple[float, float]]) -> str:
    by_limits: dict[tuple[float, float], list[str]] = {}
    for kind in kinds:
        by_limits.setdefault(tolerances[kind], []).append(kind)
    stated = [f"{', '.join(names)}: {loss:.0e} / {grad_norm:.0e}" for (loss, grad_norm), names in by_limits.items()]
    return "Tolerances:\n\n" + "".join(f"- {line}\n" for line in stated)


def _table(results: Mapping[str, Result], layouts: list[str], kinds: list[str]) -> str:
    lines = ["| layout | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    lines += [
        f"| {layout} | " + " | ".join(cell(results.get(f"{kind}/{layout}")) for kind in kinds) + " |"
        for layout in layouts
    ]
    return "\n".join(lines) + "\n"


def cell(result: Result | None) -> str:
    """A cell of the table."""
    if result is None:
        return "-"
    if "refused" in result:
        return "R"
    if "failed" in result:
        return "FAILED"
    is_equal = result["is_exact"] and result["ranks_agree"]
    mark = "" if result["is_within"] else " OUT" if is_equal else " UNEQUAL"
    mark = mark if is_equal else " UNEQUAL"
    flips = f", {result['flips']} flips" if result["flips"] else ""
    return f"{result['loss']:.0e} / {result['grad_norm']:.0e}{flips}{mark}"


def _summary(results: Mapping[str, Result], layouts: list[str], kinds: list[str], bases: Mapping[str, str]) -> str:
    """Counts of cells, flips, and of the layouts on which a kind has every bit of another."""
    cells = [results.get(f"{kind}/{layout}") for layout in layouts for kind in kinds]
    run = [found for found in cells if found is not None and "loss" in found]
    held = sum(found["is_within"] and found["ranks_agree"] and not found["flips"] for found in run)
    flipped = [found["flips"] for found in run if found["flips"]]
    lines = [
        f"{len(run)} cells were run; {held} are within the tolerance with every number equal and no flip of a router.",
        f"Flips, tokens that went to other experts than on one process: {sum(flipped)}, in {len(flipped)} cells.",
    ]
    for kind, base in bases.items():
        pairs = [(results.get(f"{kind}/{layout}"), results.get(f"{base}/{layout}")) for layout in layouts]
        both = [(one["bits"], two["bits"]) for one, two in pairs if one and two and "bits" in one and "bits" in two]
        if both:
            same = sum(one == two for one, two in both)
            lines.append(f"`{kind}` has every bit of `{base}` in {same} of the {len(both)} layouts that have both.")
    return "\n".join(f"- {line}" for line in lines) + "\n"


def _refusals(results: Mapping[str, Result], layouts: list[str], kinds: list[str]) -> str:
    reasons: dict[str, list[str]] = {}
    for layout in layouts:
        for kind in kinds:
            if reason := results.get(f"{kind}/{layout}", {}).get("refused"):
                reasons.setdefault(reason, []).append(f"{kind} {layout}")
    if not reasons:
        return ""
    return "Refused:\n\n" + "".join(f"- {', '.join(where)}: {reason}\n" for reason, where in reasons.items())


def _restarts(restarts: Mapping[str, Result]) -> str:
    if not restarts:
        return ""
    lines = [
        "## Restart",
        "",
        "The network with experts stops at step 10 and continues on its own layout; its state goes to one process, to",
        "the next layout of the list, and back to one process. There the state, weights and both moments, is compared",
        "byte for byte, and the step after it on both layouts: samples, masks and counts must be equal; `loss` is its",
        "largest relative difference. The last three columns are of a larger network with experts, whose state goes",
        "from one process to the layout and is saved by it: the fullest rank's part of the state, and how much memory",
        "a rank allocates beside its part, to load and to save, with the largest tensor to hold it against.",
        "",
        "| layout | continues bit for bit | next | state the same | samples and masks the same | loss "
        "| fullest part | load / save MB | largest tensor MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, result in restarts.items():
        if "failed" in result:
            lines.append(f"| {name} | FAILED |  |  |  |  |  |  |  |")
            continue
        lines.append(
            f"| {name} | {_yes(result['is_equal'])} | {result['other']} | {_yes(result['is_same_state'])} "
            f"| {_yes(result['is_same_step'])} | {result['loss']:.0e} | {result['largest_share']:.2f} "
            f"| {result['load_bytes'] / 1e6:.1f} / {result['save_bytes'] / 1e6:.1f} "
            f"| {result['largest_tensor_bytes'] / 1e6:.1f} |"
        )
    return "\n".join(lines) + "\n"


def _yes(value: bool) -> str:
    return "yes" if value else "NO"
