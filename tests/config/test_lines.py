from __future__ import annotations

import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megamask.config.lines import entries_of, line_of, parse_yaml, resolve_plain, value_of_node
from megamask.errors import UsageError

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**64), 2**64)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text("abc \n'\"é:#-", max_size=8),
    lambda below: (
        st.lists(below, max_size=3) | st.dictionaries(st.text("abcé", min_size=1, max_size=4), below, max_size=3)
    ),
    max_leaves=8,
)


@given(json_values)
def test_what_yaml_dumps_is_read_back_as_the_same_value(value):
    text = yaml.safe_dump(value, default_style='"' if isinstance(value, str) else None, allow_unicode=True)
    node = parse_yaml(text, "x.yaml")
    assert (None if node is None else value_of_node(node)) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("~", None),
        ("null", None),
        ("true", True),
        ("False", False),
        ("yes", "yes"),
        ("off", "off"),
        ("0", 0),
        ("-7", -7),
        ("+7", 7),
        ("010", "010"),
        ("1_000", "1_000"),
        ("0x10", "0x10"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("1e-3", 1e-3),
        ("1.0E+2", 100.0),
        (".5", 0.5),
        ("5.", 5.0),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        ("inf", "inf"),
        ("1e", "1e"),
        (".", "."),
        ("9" * 101, float("9" * 101)),
    ],
)
def test_plain_scalars_follow_the_core_schema(text, value):
    found = resolve_plain(text)
    assert found == value
    assert type(found) is type(value)


def test_not_a_number_is_read_as_one():
    assert math.isnan(resolve_plain(".nan"))


def test_quoted_scalars_are_strings_whatever_they_look_like():
    assert value_of_node(parse_yaml("a: '1'\nb: \"null\"\nc: |\n  true\n", "x")) == {
        "a": "1",
        "b": "null",
        "c": "true\n",
    }


def test_every_key_remembers_its_line():
    node = parse_yaml("# a comment\na:\n\n  b: 1\nc: [2,\n 3]\n", "x")
    (a, a_line, below), (c, c_line, items) = entries_of(node)
    assert (a, a_line, c, c_line) == ("a", 2, "c", 5)
    assert [(key, line) for key, line, _ in entries_of(below)] == [("b", 4)]
    assert [line_of(item) for item in items.value] == [5, 6]


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n", "\n\n"])
def test_empty_document_is_none(text):
    assert parse_yaml(text, "x") is None


@pytest.mark.parametrize("text", ["a: &x 1", "a: *x", "a: !t 1", "<<: {a: 1}", "a: 1\na: 2", "a: [", "--- 1\n--- 2"])
def test_refusals_name_file_and_line(text):
    with pytest.raises(UsageError, match=r"^dir/file\.yaml:\d+: .*Nothing was started\.$"):
        parse_yaml(text, "dir/file.yaml")
