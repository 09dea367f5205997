#!/usr/bin/env python3
"""Run every layout beside one process and write docs/parity.md: one loss on every axis.

    tools/parity_matrix.py [--kinds dense,moe] [--layouts tp2,cp2] [--restarts] [--results FILE] [--page]

A cell is the largest relative difference of loss and gradient norm over 20 steps to the same network on one process.
Eligible and masked tokens, masks by noise level and the content sum of every step must be equal. A case that the rules
refuse is shown with their reason. Results are kept in FILE, so that a run can be continued; --page writes the page from
them and runs nothing.

The cases are on networks of the tests (tests/support/parity_cases.py). Processes are forked from this one, which keeps
the imports; each case makes its own process group and layout.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rank_pool import RankPool

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support import parity_cases as parity  # noqa: E402

PAGE = ROOT / "docs" / "parity.md"
RESTARTS = ("one", "tp2-sp", "pp2", "pp2-vpp2", "dp2", "cp2", "tp2-dp2-sp", "pp2-cp2", "dp2-ep2", "tp2-pp2-dp2-sp")


class Results:
    """Results by `kind/layout`, written after each, so that a run that is cut short loses one case at most."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.found: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def keep(self, key: str, result: dict[str, Any]) -> None:
        """Add a result and write all of them."""
        self.found[key] = result
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps(self.found, indent=1, sort_keys=True) + "\n")
        new.replace(self._path)


def measure(pool: RankPool, kinds: list[str], layouts: list[str], results: Results) -> None:
    """Run the cases that have no result yet, those of few processes first."""
    cases = [
        (kind, layout)
        for layout in sorted(parity.LAYOUTS, key=parity.num_processes)
        for kind in kinds
        if parity.name_of(layout) in layouts
    ]
    of_one_process: dict[str, list[dict[str, Any]]] = {}
    for kind, layout in cases:
        key = f"{kind}/{parity.name_of(layout)}"
        if reason := parity.refusal(kind, layout):
            results.keep(key, {"refused": reason})
        elif "loss" not in results.found.get(key, {}):
            base = parity.BASE.get(kind, kind)
            if base not in of_one_process:
                of_one_process[base] = pool.run(1, parity.run_case, base, {})[0]
            began = time.monotonic()
            ranks = pool.run(parity.num_processes(layout), parity.run_case, kind, layout)
            result = parity.differences(ranks[0], of_one_process[base])
            result |= {"ranks_agree": all(reports == ranks[0] for reports in ranks), "bits": _bits(ranks[0])}
            results.keep(key, result | {"is_within": parity.is_within(kind, result)})
            print(key, results.found[key], f"{time.monotonic() - began:.1f} s", flush=True)


def _bits(reports: list[dict[str, Any]]) -> str:
    """A digest of every bit of the reports."""
    return hashlib.sha256(json.dumps(reports, sort_keys=True).encode()).hexdigest()[:16]


def restart(pool: RankPool, root: Path, results: Results) -> None:
    """Stop and continue on ten layouts; carry each state to one process and on to the next layout."""
    by_name = {parity.name_of(layout): layout for layout in parity.LAYOUTS} | {"one": {}}
    for place, name in enumerate(RESTARTS):
        key, kind = f"restart/{name}", "moe"
        if key in results.found:
            continue
        layout, other = by_name[name], by_name[RESTARTS[(place + 1) % len(RESTARTS)]]
        ranks = pool.run(parity.num_processes(layout), parity.run_restart, str(root), kind, layout)
        source = f"{kind}-{name}"
        [one] = pool.run(1, parity.reshard, str(root), kind, source, "single", {})
        far = pool.run(parity.num_processes(other), parity.reshard, str(root), kind, "single", "far", other)
        pool.run(1, parity.reshard, str(root), kind, "far", "back", {})
        found = {
            "is_equal": all(rank["is_equal"] for rank in ranks),
            "other": parity.name_of(other),
            "is_same_state": _digest(root / "single") == _digest(root / "back"),
            "loss": abs(far[0]["report"]["loss"] - one["report"]["loss"]) / one["report"]["loss"],
            "largest_share": max(rank["stored"] for rank in far) / sum(rank["stored"] for rank in far),
        }
        results.keep(key, found)
        print(key, found, flush=True)


def _digest(folder: Path) -> list[bytes]:
    """The bytes of a state that one process wrote."""
    return [file.read_bytes() for file in sorted(folder.iterdir())]


def page(results: dict[str, Any]) -> str:
    """The page of the results."""
    lines = [
        "# Parity: layouts beside one process",
        "",
        "Written by `tools/parity_matrix.py`. A cell is the largest relative difference over 20 steps to one process:",
        "loss / gradient norm. In every cell eligible and masked tokens, masks by noise level and the content sum of",
        "each step are equal, and all ranks report the same. tp, pp, vpp, cp, dp, ep, etp: ranks on the axes; sp:",
        "sequence parallelism. `-`: not run. R: refused before a process starts, for the reason below.",
        "",
    ]
    kinds = [kind for kind in parity.KINDS if any(key.startswith(f"{kind}/") for key in results)]
    lines += ["| layout | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    reasons: dict[str, list[str]] = {}
    for layout in parity.LAYOUTS:
        cells = []
        for kind in kinds:
            result = results.get(f"{kind}/{parity.name_of(layout)}")
            cells.append(_cell(result))
            if result and "refused" in result:
                reasons.setdefault(result["refused"], []).append(f"{kind} {parity.name_of(layout)}")
        lines.append(f"| {parity.name_of(layout)} | " + " | ".join(cells) + " |")
    lines += ["", "Refused:", ""] + [f"- {', '.join(where)}: {reason}" for reason, where in reasons.items()]
    restarts = {key: result for key, result in results.items() if key.startswith("restart/")}
    if restarts:
        lines += [
            "",
            "## Restart",
            "",
            "The network with experts stops at step 10 and continues; its state goes to one",
        ]
        lines += ["process, to another layout, and back to one process.", ""]
        lines += [
            "| layout | continues bit for bit | through | state the same, bit for bit | loss there | largest share |"
        ]
        lines += ["|---|---|---|---|---|---|"]
        lines += [
            f"| {key.split('/')[1]} | {_yes(result['is_equal'])} | {result['other']} "
            f"| {_yes(result['is_same_state'])} | {result['loss']:.0e} | {result['largest_share']:.2f} |"
            for key, result in restarts.items()
        ]
    return "\n".join(lines) + "\n"


def _cell(result: dict[str, Any] | None) -> str:
    if result is None:
        return "-"
    if "refused" in result:
        return "R"
    mark = "" if result["is_exact"] and result["ranks_agree"] else " UNEQUAL"
    flips = f", {result['flips']} flips" if result["flips"] else ""
    return f"{result['loss']:.0e} / {result['grad_norm']:.0e}{flips}{mark}"


def _yes(value: bool) -> str:
    return "yes" if value else "NO"


def main() -> None:
    """Run what is asked for and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [parity.name_of(layout) for layout in parity.LAYOUTS]
    parser.add_argument("--kinds", default=",".join(parity.KINDS))
    parser.add_argument("--layouts", default=",".join(names))
    parser.add_argument("--restarts", action="store_true", help="ten layouts stop, continue and change places")
    parser.add_argument("--results", type=Path, default=Path("parity.json"))
    parser.add_argument("--page", action="store_true", help="write the page from the results and run nothing")
    arguments = parser.parse_args()
    results = Results(arguments.results)
    if arguments.page:
        PAGE.write_text(page(results.found))
        return
    with tempfile.TemporaryDirectory() as folder:
        pool = RankPool(Path(folder))
        if arguments.restarts:
            restart(pool, Path(folder) / "states", results)
        measure(pool, arguments.kinds.split(","), arguments.layouts.split(","), results)


if __name__ == "__main__":
    main()
