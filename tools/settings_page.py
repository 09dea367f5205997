#!/usr/bin/env python3
"""Write docs/settings.md from the schema of the settings.

tools/settings_page.py            # write the page
tools/settings_page.py --check    # exit code 1 if the page is out of date; nothing is written
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "platform")]

from megamask.config.keys import Key, all_keys, all_sections  # noqa: E402
from megamask.config.schema.roots import PrepareConfig, TrainConfig  # noqa: E402

PAGE = ROOT / "docs" / "settings.md"
INTRODUCTION = """\
# Settings

Every key of a config, generated from `platform/megamask/config/schema/` by `tools/settings_page.py`.
`megamask explain KEY` shows one of them, with a config also its value and origin.

A key is given in a YAML file (`training:` with `steps: 20` below it) or on the command line (`training.steps=20`).
*Identity* keys shape the result and never change within a run. *Extendable* keys may only grow from one attempt to the
next. *Operational* keys may change with every attempt. In a path, `~` is the home folder and `${paths.NAME}` an entry
of the section `paths`.
"""
TABLE = "\n| key | allowed | default | kind | meaning |\n|---|---|---|---|---|\n"


def page() -> str:
    """Return the text of docs/settings.md."""
    return "".join(
        [
            INTRODUCTION,
            "\n## Training: `megamask train`\n",
            *_sections(TrainConfig),
            "\n## Corpora: `megamask prepare`\n",
            *_sections(PrepareConfig),
        ]
    )


def _sections(root: type) -> Iterator[str]:
    keys = all_keys(root).values()
    for name, section in all_sections(root).items():
        own = [key for key in keys if key.name.rpartition(".")[0] == name]
        if own:
            yield f"\n### {name}\n\n{(section.__doc__ or '').strip().splitlines()[0]}\n{TABLE}{''.join(map(_row, own))}"
    free = [key for key in keys if "." not in key.name]
    yield f"\n### {', '.join(key.name for key in free)}\n{TABLE}{''.join(map(_row, free))}"


def _row(key: Key) -> str:
    default = "required" if key.is_required else f"`{_plain(key.default)}`"
    meaning = key.setting.doc
    if key.setting.variants is not None:
        meaning += f" (only with `{key.name.rpartition('.')[0]}.name` {' or '.join(key.setting.variants)})"
    if key.setting.unit is not None:
        meaning += f" [{key.setting.unit}]"
    cells = (f"`{key.name}`", key.allowed, default, key.setting.kind, meaning)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _plain(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value) if isinstance(value, str) and not value else str(value)


def main() -> int:
    """Write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the page is out of date")
    arguments = parser.parse_args()
    if not arguments.check:
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    return int(PAGE.read_text(encoding="utf-8") != page())


if __name__ == "__main__":
    sys.exit(main())
