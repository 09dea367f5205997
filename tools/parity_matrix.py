#!/usr/bin/env python3
"""Run every layout beside one process and write docs/parity.md: one loss on every axis.

    tools/parity_matrix.py [--kinds dense,moe] [--layouts tp2,cp2] [--restarts] [--results FILE] [--page]

A cell is the largest relative difference of loss and gradient norm over 20 steps to the same network on one process.
Counts of tokens, masks by noise level and the digests of samples and content must be equal in every step. A case that
the rules refuse is shown with their reason. Results are kept in FILE after each case, so that a run can be continued;
a case that failed is run again. --page writes the page from them and runs nothing.

The cases are on networks of the tests (tests/support/parity_cases.py). Processes are forked from this one, which keeps
the imports; each case makes its own process group and layout. Exit code: 1 where a case failed or kept no tolerance.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from parity_page import page
from rank_pool import RankPool

from megamask.provenance.record import code_version, library_versions

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support import parity_cases as parity  # noqa: E402
from support import state_memory  # noqa: E402

PAGE = ROOT / "docs" / "parity.md"
RESTARTS = ("one", "tp2-sp", "pp2", "pp2-vpp2", "dp2", "cp2", "tp2-dp2-sp", "pp2-cp2", "dp2-ep2", "tp2-pp2-dp2-sp")
BY_NAME: dict[str, dict[str, Any]] = {parity.name_of(layout): layout for layout in parity.LAYOUTS} | {"one": {}}


class Results:
    """Results by `kind/layout`, written after each, so that a run that is cut short loses one case at most."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.found: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def has(self, key: str) -> bool:
        """Return whether a case was run and did not fail; one that was refused may be allowed by now."""
        return not {"failed", "refused"} & self.found.get(key, {"failed": ""}).keys()

    def keep(self, key: str, result: dict[str, Any]) -> None:
        """Add a result and write all of them."""
        self.found[key] = result
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps(self.found, indent=1) + "\n")
        new.replace(self._path)

    def run(self, key: str, case: Callable[[], dict[str, Any]]) -> None:
        """Keep what a case returns, or the end of the error that it raised."""
        began = time.monotonic()
        try:
            result = case()
        except Exception as error:  # noqa: BLE001 - the other cases are run all the same
            result = {"failed": f"{type(error).__name__}: {error}"[-600:]}
        self.keep(key, result)
        print(key, result, f"{time.monotonic() - began:.1f} s", flush=True)

    def faults(self) -> list[str]:
        """Cases that failed or kept no promise."""
        return [key for key, result in self.found.items() if key != "about" and _is_fault(result)]


def _is_fault(result: dict[str, Any]) -> bool:
    promises = ("is_within", "ranks_agree", "is_equal", "is_same_state", "is_same_step")
    return "failed" in result or not all(result.get(name, True) for name in promises)


def measure(pool: RankPool, kinds: list[str], layouts: list[str], results: Results) -> None:
    """Run the cases that have no result yet, those of few processes first."""
    of_one_process: dict[str, list[dict[str, Any]]] = {}

    def single(kind: str) -> list[dict[str, Any]]:
        base = parity.BASE.get(kind, kind)
        if base not in of_one_process:
            of_one_process[base] = pool.run(1, parity.run_case, base, {})[0]
        return of_one_process[base]

    def case(kind: str, layout: dict[str, Any]) -> dict[str, Any]:
        ranks = pool.run(parity.num_processes(layout), parity.run_case, kind, layout)
        result = parity.differences(ranks[0], single(kind))
        result |= {"ranks_agree": all(reports == ranks[0] for reports in ranks), "bits": _bits(ranks[0])}
        return result | {"is_within": parity.is_within(kind, result)}

    for layout in sorted(parity.LAYOUTS, key=parity.num_processes):
        for kind in kinds if parity.name_of(layout) in layouts else ():
            key = f"{kind}/{parity.name_of(layout)}"
            if reason := parity.refusal(kind, layout):
                results.keep(key, {"refused": reason})
            elif not results.has(key):
                results.run(key, lambda kind=kind, layout=layout: case(kind, layout))  # type: ignore[misc]


def _bits(reports: list[dict[str, Any]]) -> str:
    """A digest of every bit of the reports."""
    return hashlib.sha256(json.dumps(reports, sort_keys=True).encode()).hexdigest()[:16]


def restart(pool: RankPool, root: Path, results: Results) -> None:
    """Stop and continue on ten layouts; carry each state to one process and on to the next layout."""
    for place, name in enumerate(RESTARTS):
        other, key = RESTARTS[(place + 1) % len(RESTARTS)], f"restart/{name}"
        if not results.has(key):
            results.run(key, lambda name=name, other=other: _restart(pool, root, name, other))  # type: ignore[misc]


def _restart(pool: RankPool, root: Path, name: str, other: str) -> dict[str, Any]:
    kind, layout = "moe", BY_NAME[name]
    ranks = pool.run(parity.num_processes(layout), parity.run_restart, str(root), kind, layout)
    [one] = pool.run(1, parity.reshard, str(root), kind, f"{kind}-{name}", "single", {})
    far = pool.run(
        parity.num_processes(BY_NAME[other]), parity.reshard, str(root), kind, "single", "far", BY_NAME[other]
    )
    pool.run(1, parity.reshard, str(root), kind, "far", "back", {})
    step = parity.differences([far[0]["report"]], [one["report"]])
    return {
        "is_equal": all(rank["is_equal"] for rank in ranks),
        "other": other,
        "is_same_state": _contents(root / "single") == _contents(root / "back"),
        "is_same_step": step["is_exact"],
        "loss": step["loss"],
    } | _memory(pool, root, layout)


def _memory(pool: RankPool, root: Path, layout: dict[str, Any]) -> dict[str, Any]:
    """Load of the fullest rank of a layout, and the rise of memory beside its part to load and to save."""
    source, target = root / "memory", root / "memory-saved"
    if not source.exists():
        pool.run(1, state_memory.of_experts, {}, None, str(source))
    shutil.rmtree(target, ignore_errors=True)
    ranks = pool.run(parity.num_processes(layout), state_memory.of_experts, layout, str(source), str(target))
    return {
        "largest_share": max(rank["share"] for rank in ranks) / sum(rank["share"] for rank in ranks),
        "load_bytes": max(rank["load"] for rank in ranks),
        "save_bytes": max(rank["save"] for rank in ranks),
        "largest_tensor_bytes": ranks[0]["largest"],
    }


def _contents(folder: Path) -> dict[str, bytes]:
    """The files of a state that one process wrote."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def write_page(results: Results) -> None:
    """Write the page from the results."""
    text = page(
        results.found,
        [parity.name_of(layout) for layout in parity.LAYOUTS],
        list(parity.KINDS),
        tolerances={kind: parity.tolerance(kind) for kind in parity.KINDS},
        bases={kind: base for kind, base in parity.BASE.items() if kind in parity.KINDS},
        num_steps=parity.NUM_STEPS,
    )
    PAGE.write_text(text, encoding="utf-8")


def _about() -> dict[str, str]:
    """Date, commit and machine of the cases."""
    libraries = library_versions()
    named = [f"{name} {libraries[name]}" for name in ("torch", "megatron-core") if name in libraries]
    return {"date": datetime.now(UTC).date().isoformat(), "versions": ", ".join([f"megamask {code_version()}", *named])}


def main() -> int:
    """Run what is asked for and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [parity.name_of(layout) for layout in parity.LAYOUTS]
    parser.add_argument("--kinds", default=",".join(parity.KINDS))
    parser.add_argument("--layouts", default=",".join(names))
    parser.add_argument("--restarts", action="store_true", help="ten layouts stop, continue and change places")
    parser.add_argument("--results", type=Path, default=Path("parity.json"))
    parser.add_argument("--page", action="store_true", help="write the page from the results and run nothing")
    arguments = parser.parse_args()
    kinds, layouts = arguments.kinds.split(","), arguments.layouts.split(",")
    if unknown := sorted({*kinds} - {*parity.KINDS, *parity.BASE}) + sorted({*layouts} - {*names, ""}):
        parser.error(f"unknown: {', '.join(unknown)}; kinds are {', '.join(parity.KINDS)}, layouts {', '.join(names)}")
    results = Results(arguments.results)
    if arguments.page:
        write_page(results)
        return 0
    results.keep("about", _about())
    with tempfile.TemporaryDirectory() as folder:
        pool = RankPool(Path(folder))
        (Path(folder) / "states").mkdir()
        if arguments.restarts:
            restart(pool, Path(folder) / "states", results)
        measure(pool, kinds, layouts, results)
    for key in results.faults():
        print("FAULT", key, results.found[key], flush=True)
    return 1 if results.faults() else 0


if __name__ == "__main__":
    raise SystemExit(main())
