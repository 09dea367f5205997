from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megamask.config.dump import to_plain, to_yaml
from megamask.config.keys import Key, all_keys, all_sections
from megamask.config.load import load_config, load_train_config
from megamask.config.schema.corpus import CorpusConfig, TokenizerConfig
from megamask.config.schema.roots import PrepareConfig, TrainConfig
from megamask.config.secrets import carries_credential
from megamask.config.variants import meaningless_keys

CONFIGS = Path(__file__).parents[2] / "configs"
TRICKY = ["1e3", "null", "yes", "No", "~", "", " ", "1", "0x10", "a: b", "#x", "- a", "'", '"', "a\nb\n", "é", "\u2028"]
# Refused on purpose in any value: NUL and the looks of a credential or of a reference to the environment.
characters = st.characters(codec="utf-8", exclude_characters="\0@?:")
texts = st.one_of(st.sampled_from([*TRICKY, "${", "${a.b}", "${oc.env:HOME}", "???", "\\${x}"]), st.text(characters))
# A path is not empty, names no variable, and ~ would be replaced.
paths = st.one_of(st.sampled_from(TRICKY), st.text(characters)).filter(
    lambda text: text and "$" not in text and not text.startswith("~")
)


def values(key: Key) -> st.SearchStrategy:
    setting = key.setting
    strings = paths if setting.is_path else texts
    if setting.choices:
        found = st.sampled_from(setting.choices)
    elif key.name == "initialise.shift":
        found = st.sampled_from(["keep", "drop", "{until_step: 7}"])
    elif key.name == "initialise.mask_row":
        found = st.sampled_from(["unused", "mean", "17"])
    elif setting.pattern and key.name.startswith("launch."):
        found = st.from_regex(setting.pattern, fullmatch=True).filter(lambda text: not carries_credential(text))
    elif setting.pattern:
        found = st.from_regex(r"\A[A-Za-z0-9_-][A-Za-z0-9._-]{0,20}\Z")
    elif key.base == "int":
        found = st.integers(setting.minimum, setting.maximum or 2**62)
    elif key.base == "float":
        low = setting.minimum if setting.minimum is not None else setting.above
        high = setting.maximum if setting.maximum is not None else setting.below
        found = st.floats(low, high, allow_nan=False, allow_infinity=False).filter(setting.accepts)
    elif key.base == "bool":
        found = st.booleans()
    elif key.base == "list":
        found = st.lists(strings, max_size=3)
    elif key.base == "entries":
        options = {"name": texts, "format": texts}
        found = st.lists(paths | st.fixed_dictionaries({"path": paths}, optional=options), max_size=3)
    elif key.base == "stages":
        numbers = st.integers(1, 10**12) | st.floats(1e-9, 1e9)
        shares = st.dictionaries(st.from_regex(r"\A[A-Za-z0-9._-]{1,20}\Z"), numbers, min_size=1, max_size=3)
        stage = st.fixed_dictionaries(
            {"weights": shares}, optional={"until_tokens": st.integers(1), "max_epochs": shares}
        )
        found = st.lists(stage, max_size=3)
    elif key.base == "dict":
        smallest = 1 if key.is_required else 0
        names = st.from_regex(r"\A[A-Za-z0-9._-]{1,20}\Z")
        found = st.dictionaries(names, strings, min_size=smallest, max_size=3)
    else:
        found = strings
    return st.one_of(st.none(), found) if key.is_optional else found


def configs(root: type, prefix: str = "", top: type | None = None) -> st.SearchStrategy:
    top = top or root
    parts = {}
    for field in dataclasses.fields(root):
        name = prefix + field.name
        section = all_sections(top).get(name)
        parts[field.name] = values(all_keys(top)[name]) if section is None else configs(section, f"{name}.", top)
    built = st.builds(root, **parts)
    return built.map(at_their_defaults) if prefix == "" else built


def at_their_defaults(config):
    """The config with the default of every key that has no meaning for the variants that it chooses."""
    for name in meaningless_keys(config):
        section, _, key = name.partition(".")
        part = dataclasses.replace(getattr(config, section), **{key: all_keys(type(config))[name].default})
        config = dataclasses.replace(config, **{section: part})
    return config


def read_back(text: str, root: type) -> object:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.yaml"
        path.write_bytes(text.encode())
        return load_config(root, path).config


BASE = load_train_config(CONFIGS / "run" / "tiny.yaml").config


@pytest.mark.promise("config -> YAML -> config loses nothing")
@pytest.mark.parametrize("section", [field.name for field in dataclasses.fields(TrainConfig)])
@settings(max_examples=12)
@given(data=st.data())
def test_train_config_survives_yaml_unchanged(section, data):
    """One section at a time: all of them together are more than hypothesis draws at once."""
    kind = all_sections(TrainConfig).get(section)
    drawn = values(all_keys(TrainConfig)[section]) if kind is None else configs(kind, f"{section}.", TrainConfig)
    config = at_their_defaults(dataclasses.replace(BASE, **{section: data.draw(drawn)}))
    assert read_back(to_yaml(config), TrainConfig) == config


@given(configs(PrepareConfig))
@example(
    PrepareConfig(
        corpus=CorpusConfig(
            inputs=[text for text in TRICKY if text not in ("", "~")],
            output_dir="null",
            sequence_length=16,
            tokenizer=TokenizerConfig(path="on"),
            licence="1e3",
        )
    )
)
def test_prepare_config_survives_yaml_unchanged(config):
    again = read_back(to_yaml(config), PrepareConfig)
    assert again == config
    assert to_yaml(again) == to_yaml(config)


@given(texts)
def test_dumped_string_is_the_same_string_to_other_yaml_readers(text):
    config = PrepareConfig(
        corpus=CorpusConfig(inputs=[text], output_dir=text, sequence_length=16, tokenizer=TokenizerConfig())
    )
    assert yaml.safe_load(to_yaml(config))["corpus"]["output_dir"] == text


ANY_PREPARE = PrepareConfig(
    corpus=CorpusConfig(inputs=["a"], output_dir="b", sequence_length=16, tokenizer=TokenizerConfig())
)


def test_yaml_is_in_schema_order_and_complete():
    loaded = yaml.safe_load(to_yaml(ANY_PREPARE))
    assert list(loaded["corpus"]) == [field.name for field in dataclasses.fields(CorpusConfig)]
    assert loaded == to_plain(ANY_PREPARE)


def test_plain_shares_nothing_with_the_config():
    plain = to_plain(ANY_PREPARE)
    plain["corpus"]["inputs"].append("c")
    assert ANY_PREPARE.corpus.inputs == ["a"]


@pytest.mark.parametrize("word", ["yes", "off", "Null", "TRUE", "1e3", "1_000", "12:30", "2024-01-01", "0o7", ".5"])
def test_strings_that_yaml_1_1_would_take_for_something_else_are_quoted(word):
    config = dataclasses.replace(ANY_PREPARE, corpus=dataclasses.replace(ANY_PREPARE.corpus, output_dir=word))
    assert f"output_dir: {word}\n" not in to_yaml(config)
    assert yaml.safe_load(to_yaml(config))["corpus"]["output_dir"] == word
