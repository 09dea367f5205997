"""`megamask explain [KEY] [CONFIG.yaml] [overrides]`: what a setting means, and who set it."""

from __future__ import annotations

import argparse
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("key", nargs="?", help="a key as training.steps, or a section as layout; without it, every key")
    parser.add_argument("config", nargs="?", help="a config whose values are wanted too, and who set them")
    parser.add_argument("overrides", nargs="*", default=[], help="key.path=value, on top of the config")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Explain one key, a section or everything.

    Returns: key, and settings: the list that `megamask.config.explain.explain` returns; for one key its fields too.
    """
    from megamask.config.explain import explain

    key, config, overrides = arguments.key, arguments.config, list(arguments.overrides)
    if key is not None and key.endswith((".yaml", ".yml")):  # `explain CONFIG.yaml`: every key of it
        overrides = [*([config] if config is not None else []), *overrides]
        key, config = None, key
    settings = explain(key, config, overrides)
    result: dict[str, Any] = {"key": key, "settings": settings}
    return {**settings[0], "settings": settings} if len(settings) == 1 else result


def render(result: dict[str, Any]) -> str:
    """A paragraph for one key, a line each for several."""
    settings = result["settings"]
    if len(settings) == 1:
        return _paragraph(settings[0])
    width = max(len(setting["key"]) for setting in settings)
    return "\n".join(f"{setting['key']:{width}}  {_value(setting)}  {setting['doc']}" for setting in settings)


def _paragraph(setting: dict[str, Any]) -> str:
    default = "none, the key must be given" if setting["required"] else _plain(setting["default"])
    facts = {
        "type": setting["type"],
        "unit": setting["unit"],
        "allowed": setting["allowed"],
        "default": default,
        "kind": f"{setting['kind']}: {setting['kind_meaning']}",
        "used by": f"megamask {setting['command']}",
    }
    if "value" in setting:
        facts |= {"value": _plain(setting["value"]), "set by": setting["set_by"]}
    lines = [f"  {name:8} {fact}" for name, fact in facts.items() if fact is not None]
    return "\n".join([setting["key"], f"  {setting['doc']}", *lines])


def _value(setting: dict[str, Any]) -> str:
    if "value" in setting:
        return f"{_plain(setting['value'])} ({setting['set_by']})"
    return "(required)" if setting["required"] else f"({_plain(setting['default'])})"


def _plain(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
