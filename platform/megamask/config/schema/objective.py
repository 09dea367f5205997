"""The diffusion objective."""

from __future__ import annotations

from dataclasses import dataclass

from megamask.config.schema.field import identity
from megamask.config.schema.section import Section


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(Section):
    """Masked diffusion: noise schedule, views and the logits that count."""

    noise_schedule: str = identity(
        "how the mask probability p depends on t", default="linear", choices=("linear", "cosine_md4", "cosine_bd3")
    )
    complementary: bool = identity(
        "two views of each sample, the second masking what the first leaves visible", default=True
    )
    mask_logit: str = identity(
        "whether the mask token's logit enters the softmax", default="excluded", choices=("excluded", "included")
    )
    z_loss_weight: float = identity(
        "weight of the z-loss: the squared logarithm of the softmax's normaliser at each masked position; 0 for none",
        default=0.0,
        minimum=0,
    )
