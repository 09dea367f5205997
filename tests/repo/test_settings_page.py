"""docs/settings.md is the schema of the settings."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from megamask.config.keys import all_keys
from megamask.config.schema.roots import PrepareConfig, TrainConfig

TOOL = Path(__file__).parents[2] / "tools" / "settings_page.py"


def load_tool():
    spec = importlib.util.spec_from_file_location("settings_page", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.promise("docs/settings.md lists every setting and is up to date")
def test_page_lists_every_setting_and_is_up_to_date() -> None:
    tool = load_tool()
    written = tool.PAGE.read_text(encoding="utf-8")
    assert written == tool.page(), "docs/settings.md is out of date. To fix it, run: tools/settings_page.py"
    for name in (*all_keys(TrainConfig), *all_keys(PrepareConfig)):
        assert f"| `{name}` |" in written
