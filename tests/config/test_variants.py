"""Tagged unions: keys without a meaning for the chosen objective are refused, not recorded and not stored."""

from __future__ import annotations

from pathlib import Path

import pytest

from megamask.config.dump import to_plain
from megamask.config.identity import compare_identity, identity_fields
from megamask.config.load import load_train_config
from megamask.config.validate import validate_train
from megamask.errors import UsageError

TINY = Path(__file__).parents[2] / "configs" / "run" / "tiny.yaml"


def loaded(*overrides: str):
    return load_train_config(str(TINY), list(overrides))


@pytest.mark.promise("a key without a meaning for `objective.name` is refused, even at its default")
@pytest.mark.parametrize("value", ["true", "false"])
def test_key_without_a_meaning_is_refused_by_name_where_it_was_given(value: str) -> None:
    found = loaded("objective.name=autoregressive", f"objective.complementary={value}")
    with pytest.raises(UsageError) as caught:
        validate_train(found.config, found.origins)
    assert "objective.complementary" in caught.value.message
    assert "objective.name is autoregressive, for which this key has no meaning" in caught.value.message
    assert "it belongs to objective.name=masked" in caught.value.message
    assert caught.value.hint == "change objective.complementary on the command line"


def test_keys_without_a_meaning_are_neither_identity_nor_stored() -> None:
    config = loaded("objective.name=autoregressive").config
    validate_train(config, loaded("objective.name=autoregressive").origins)
    objective = {name for name in identity_fields(config) if name.startswith("objective.")}
    assert objective == {"objective.name", "objective.mask_logit", "objective.z_loss_weight"}
    assert {f"objective.{name}" for name in to_plain(config)["objective"]} == objective


def test_run_without_a_recorded_name_is_masked_and_another_objective_is_another_run() -> None:
    masked = loaded().config
    recorded = identity_fields(masked)
    del recorded["objective.name"]
    compare_identity(recorded, masked)
    with pytest.raises(UsageError) as caught:
        compare_identity(recorded, loaded("objective.name=autoregressive").config)
    assert "objective.name is 'autoregressive', recorded nothing (default 'masked')" in caught.value.message
    assert "no such key" not in caught.value.message
