"""The objective: what is minimised. `objective.name` decides which of the other keys have a meaning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from megamask.config.rules.problem import Problem
from megamask.config.schema.field import Setting, identity
from megamask.config.schema.section import Section

MASKED = ("masked",)
BLOCK = ("block",)
NAMES = ("masked", "autoregressive", "block")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(Section):
    """The objective by name, and its settings: noise schedule, views and the logits that count."""

    name: str = identity("what is minimised", default="masked", choices=NAMES)
    noise_schedule: str = identity(
        "how the mask probability p depends on t",
        default="linear",
        choices=("linear", "cosine_md4", "cosine_bd3", "polynomial", "sqrt"),
        variants=MASKED + BLOCK,
    )
    noise_exponent: float = identity(
        "k of the noise schedule polynomial, p rising as t^k", default=1.0, minimum=1, variants=MASKED + BLOCK
    )
    weight: str = identity(
        "weight of a masked position's cross entropy; only nelbo and any_order make the loss a bound on the likelihood",
        default="nelbo",
        choices=("nelbo", "unit", "one_minus_t", "any_order", "cart"),
        variants=MASKED,
    )
    cart_p: float = identity(
        "p of the weight cart, which grows with the visible tokens near a masked one",
        default=0.3,
        above=0,
        below=1,
        variants=MASKED,
    )
    time_sampling: str = identity(
        "how the noise levels of a batch are drawn: spread evenly over it, or one by one",
        default="stratified",
        choices=("stratified", "uniform"),
        variants=MASKED,
    )
    recipe: str | None = identity(
        "loss of a published system to the digit, in place of the settings of schedule, weight and times",
        default=None,
        choices=("llada", "mdlm", "megadlms", "dream"),
        variants=MASKED,
    )
    complementary: bool = identity(
        "two views of each sample, the second masking what the first leaves visible", default=True, variants=MASKED
    )
    block_size: int = identity(
        "tokens of a diffusion block; 1 is autoregressive", default=32, minimum=1, unit="tokens", variants=BLOCK
    )
    block_time: str = identity(
        "whether each block has a noise level of its own, or the row has one",
        default="block",
        choices=("block", "sequence"),
        variants=BLOCK,
    )
    clean_half: str = identity(
        "what a clean token sees: all of its block and of earlier ones, or the tokens before it",
        default="block_causal",
        choices=("block_causal", "token_causal"),
        variants=BLOCK,
    )
    diffusion_weight: float | None = identity(
        "weight of the diffusion loss beside the autoregressive loss of the clean half; null for diffusion alone",
        default=None,
        above=0,
        variants=BLOCK,
    )
    mask_logit: str = identity(
        "whether the mask token's logit enters the softmax", default="excluded", choices=("excluded", "included")
    )
    z_loss_weight: float = identity(
        "weight of the z-loss: the squared logarithm of the softmax's normaliser at each scored position; 0 for none",
        default=0.0,
        minimum=0,
    )

    def problems(self, config: Any) -> Iterator[Problem]:
        """Settings that a recipe replaces, and an exponent of another schedule."""
        if self.noise_exponent != 1 and self.noise_schedule != "polynomial":
            yield Problem(
                key="objective.noise_exponent",
                because=f"but objective.noise_schedule is {self.noise_schedule}",
                allowed="1; or any exponent >= 1 with objective.noise_schedule=polynomial",
            )
        if (
            self.has_meaning("diffusion_weight")
            and self.diffusion_weight is not None
            and (self.clean_half != "token_causal")
        ):
            yield Problem(
                key="objective.diffusion_weight",
                because=f"but objective.clean_half is {self.clean_half}, which is not an autoregressive model",
                allowed="null; or any weight > 0 with objective.clean_half=token_causal",
            )
        if self.recipe is None or not self.has_meaning("recipe"):
            return
        if self.complementary:
            yield Problem(
                key="objective.complementary",
                because=f"but objective.recipe is {self.recipe}, which trains one view of a sample",
                allowed="false; or objective.recipe=null",
            )
        defaults = {field.name: field.default for field in fields(self)}
        for name in ("noise_schedule", "weight", "time_sampling"):
            if getattr(self, name) != defaults[name]:
                yield Problem(
                    key=f"objective.{name}",
                    because=f"but objective.recipe is {self.recipe}, which has its own",
                    allowed=f"{defaults[name]}, its default; or objective.recipe=null",
                )

    def settings(self) -> dict[str, Any]:
        """The name and the settings that have a meaning for it."""
        return {field.name: getattr(self, field.name) for field in fields(self) if self.has_meaning(field.name)}

    def has_meaning(self, name: str) -> bool:
        """True if a key of this section has a meaning for the chosen objective."""
        [setting] = [field.metadata["setting"] for field in fields(self) if field.name == name]
        assert isinstance(setting, Setting)
        return setting.variants is None or self.name in setting.variants
