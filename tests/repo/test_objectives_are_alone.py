"""An objective's name and class occur in its own room and the config's schema; few named places know one of them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from megamask.config.schema.objective import NAMES

ROOT = Path(__file__).parents[2]
HOME = ("platform/megamask/objectives/", "platform/megamask/config/schema/")
# Modules of objectives/ that are the interface or serve several objectives; every other one is a single objective.
INTERFACE = {
    "base",
    "given_first",
    "in_force",
    "shapes",
    "registry",
    "terms",
    "schedule",
    "phased",
    "shifted",
    "warm_start",
    "divergence",
    "probing",
    "wrapped",
}
PRODUCT = [
    path
    for root in ("platform", "pipelines")
    for path in sorted((ROOT / root).rglob("*.py"))
    if not str(path.relative_to(ROOT)).startswith(HOME)
]


def mentions(text: str) -> list[str]:
    """Comparisons with an objective's name, lists of names, and imports of an objective's module."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megamask.objectives."):
            if node.module.split(".")[2] not in INTERFACE:
                found.append(f"{node.lineno}: import of {node.module}")
        elif isinstance(node, ast.Compare):
            values = [side.value for side in (node.left, *node.comparators) if isinstance(side, ast.Constant)]
            if is_of_objective(ast.unparse(node)) and set(values) & set(NAMES):
                found.append(f"{node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.Tuple | ast.List | ast.Set):
            values = [item.value for item in node.elts if isinstance(item, ast.Constant)]
            if len(set(values) & set(NAMES)) > 1:
                found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def is_of_objective(expression: str) -> bool:
    return "objective" in expression or ".name" in expression


@pytest.mark.promise("adding an objective touches its room, its config section, tests and docs only")
def test_no_other_room_knows_an_objective_by_name() -> None:
    found = {str(path.relative_to(ROOT)): mentions(path.read_text()) for path in PRODUCT}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "line",
    [
        "x = objective.name == 'autoregressive'",
        "if settings['objective']['name'] in ('masked', 'block'): pass",
        "choices = ('masked', 'autoregressive', 'block')",
        "from megamask.objectives.masked import MaskedObjective",
    ],
)
def test_a_place_that_knows_an_objective_is_found(line: str) -> None:
    assert mentions(line)
