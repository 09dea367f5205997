"""`megamask doctor`: fitness of this machine in under a minute."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

_MARKS = {"pass": "ok  ", "warn": "warn", "fail": "FAIL", "skip": "-   "}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("--folder", default="runs", metavar="FOLDER", help="where runs are kept (default: runs)")
    parser.add_argument("--host-only", action="store_true", help="do not look at devices; takes a second")
    parser.add_argument(
        "--needed-gb", type=float, default=1.0, metavar="GB", help="free space that a run needs (default 1)"
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Examine this machine; the answer is that of `examine`."""
    from megamask_pipelines.doctor import examine

    return examine(
        Path(arguments.folder), with_device=not arguments.host_only, needed_bytes=int(arguments.needed_gb * 1e9)
    )


def render(result: dict[str, Any]) -> str:
    """Return versions, features and checks for people, the verdict last."""
    versions = ", ".join(f"{name} {version or 'absent'}" for name, version in result["versions"].items())
    lines = [f"{result['node']}: {versions}", ""]
    for feature in result["features"]:
        lines.append(f"{'on  ' if feature['is_on'] else 'off '} {feature['name']}" + _because(feature["reason"]))
    lines.append("")
    lines += [f"{_MARKS[check['outcome']]} {check['name']}: {check['message']}" for check in result["checks"]]
    failed = [check["name"] for check in result["checks"] if check["outcome"] == "fail"]
    lines += ["", f"not fit: {', '.join(failed)}" if failed else "fit"]
    return "\n".join(lines)


def _because(reason: str | None) -> str:
    return "" if reason is None else f": {reason}"
