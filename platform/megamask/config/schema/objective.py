"""The objective: what is minimised. `objective.name` decides which of the other keys have a meaning."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from megamask.config.schema.field import Setting, identity
from megamask.config.schema.section import Section

MASKED = ("masked",)


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(Section):
    """The objective by name, and its settings: noise schedule, views and the logits that count."""

    name: str = identity("what is minimised", default="masked", choices=("masked", "autoregressive"))
    noise_schedule: str = identity(
        "how the mask probability p depends on t",
        default="linear",
        choices=("linear", "cosine_md4", "cosine_bd3"),
        variants=MASKED,
    )
    complementary: bool = identity(
        "two views of each sample, the second masking what the first leaves visible", default=True, variants=MASKED
    )
    mask_logit: str = identity(
        "whether the mask token's logit enters the softmax", default="excluded", choices=("excluded", "included")
    )
    z_loss_weight: float = identity(
        "weight of the z-loss: the squared logarithm of the softmax's normaliser at each scored position; 0 for none",
        default=0.0,
        minimum=0,
    )

    def settings(self) -> dict[str, Any]:
        """The name and the settings that have a meaning for it."""
        return {field.name: getattr(self, field.name) for field in fields(self) if self.has_meaning(field.name)}

    def has_meaning(self, name: str) -> bool:
        """Whether a key of this section has a meaning for the objective that is chosen."""
        [setting] = [field.metadata["setting"] for field in fields(self) if field.name == name]
        assert isinstance(setting, Setting)
        return setting.variants is None or self.name in setting.variants
