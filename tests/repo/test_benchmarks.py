"""The benchmarks can be started, measure in turns, and their tables name what ran where."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from support.command import environment

ROOT = Path(__file__).parents[2]
BENCHMARKS = sorted(path for path in (ROOT / "tools").glob("bench_*.py") if path.name != "bench_support.py")
TABLES = sorted(path for path in (ROOT / "docs" / "benchmarks").glob("*.md") if path.name != "README.md")


@pytest.fixture(scope="module")
def bench_support() -> ModuleType:
    """The module that the benchmarks share; tools is not a package."""
    spec = importlib.util.spec_from_file_location("bench_support", ROOT / "tools" / "bench_support.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_support"] = module  # where dataclasses look for the module of a class
    spec.loader.exec_module(module)
    return module


@pytest.mark.promise("cases take turns, and ratios pair the numbers of one block")
def test_cases_are_measured_in_turns_forwards_and_backwards(bench_support: ModuleType) -> None:
    calls: list[str] = []

    def case(name: str, seconds: float | None) -> object:
        return lambda: (calls.append(name), seconds)[1]

    found = bench_support.alternate({"a": case("a", 2.0), "b": case("b", None)}, blocks=3)
    assert calls == ["b", "a", "a", "b", "b", "a", "a", "b"]
    assert found["a"] == [2.0, 2.0, 2.0]
    assert len(found["b"]) == 3
    assert min(found["b"]) >= 0


@pytest.mark.promise("cases take turns, and ratios pair the numbers of one block")
def test_ratio_pairs_the_numbers_of_one_block(bench_support: ModuleType) -> None:
    found = bench_support.ratio([2.0, 20.0, 200.0], [1.0, 10.0, 100.0])
    assert (found.median, found.low, found.high, found.count) == (2.0, 2.0, 2.0, 3)
    assert str(found) == "2"
    with pytest.raises(ValueError, match="2 numbers beside 1"):
        bench_support.ratio([1.0, 2.0], [1.0])


def test_spread_is_median_and_quartiles(bench_support: ModuleType) -> None:
    found = bench_support.spread([5.0, 1.0, 3.0, 2.0, 4.0], scale=10.0)
    assert (found.median, found.low, found.high, found.count) == (30.0, 20.0, 40.0, 5)
    assert str(found) == "30 (20 to 40)"


def test_report_says_command_date_machine_and_versions_beside_every_number(
    bench_support: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--quick", "--json", str(tmp_path / "out.json"), "--markdown", str(tmp_path / "out.md")]
    monkeypatch.setattr(sys, "argv", ["bench_x.py", *arguments])
    report = bench_support.Report("bench_x", "An example", bench_support.benchmark_parser("x").parse_args(arguments))
    table = report.table("Times", ["case", "seconds", "count"], note="A note.")
    table.add("one", bench_support.spread([1.0, 2.0, 3.0]), 12345)
    with pytest.raises(ValueError, match="2 cells under 3 columns"):
        table.add("two", 1.0)
    report.keep("seconds", {"one": [1.0, 2.0, 3.0]})
    assert report.finish() == 0
    text, content = (tmp_path / "out.md").read_text(), json.loads((tmp_path / "out.json").read_text())
    assert "| one  | 2 (1.5 to 2.5) | 12,345 |" in text
    assert "A note." in text
    assert_says_what_ran(text)
    assert str(tmp_path) not in text
    assert content["seconds"] == {"one": [1.0, 2.0, 3.0]}
    assert content["tables"][0]["rows"][0][1]["median"] == 2.0
    assert content["environment"]["libraries"]["torch"]


def assert_says_what_ran(text: str) -> None:
    """A table of figures without these lines cannot be repeated or judged."""
    assert re.search(
        r"^- command: `python tools/(bench_\w+|te_on_cpu/check|fault_soak)\.py.*`", text, re.M
    ) or re.search(r"^- command: `\.venv/bin/pytest .*`$", text, re.M)
    assert re.search(r"^- date: 20\d\d-\d\d-\d\d$", text, re.M)
    assert re.search(r"^- machine: \d+ x ", text, re.M)
    assert re.search(r"^- versions: megamask .*python 3.*torch ", text, re.M)


@pytest.mark.promise("every benchmark can be started and has the common arguments")
@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.name)
def test_benchmark_answers_help_with_the_common_arguments(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(path), "--help"],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(),
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert {"--blocks", "--quick", "--json", "--markdown"} <= set(re.findall(r"--[a-z-]+", done.stdout))


@pytest.mark.promise("every table of figures names command, date, machine and versions")
@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.name)
def test_every_table_of_figures_says_command_date_machine_and_versions(path: Path) -> None:
    assert_says_what_ran(path.read_text(encoding="utf-8"))
    date = re.search(r"^- date: (\S+)$", path.read_text(encoding="utf-8"), re.M)
    assert date is not None
    assert any(path.with_suffix(suffix).exists() for suffix in (".json", ".txt")), "the raw output is kept"
    assert re.fullmatch(rf"[a-z_]+_(cpu|gpu)\d+_{date[1]}\.md", path.name)
    assert f"]({path.name})" in (path.parent / "README.md").read_text(encoding="utf-8"), "README.md lists every table"
