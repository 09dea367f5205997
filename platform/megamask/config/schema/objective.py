"""The objective: what is minimised. `objective.name` decides which of the other keys have a meaning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from megamask.config.rules.block_schedule import block_phases, block_schedule_problems
from megamask.config.rules.problem import Problem
from megamask.config.schema.field import Setting, identity
from megamask.config.schema.section import Section

MASKED = ("masked",)
BLOCK = ("block",)
MIXED = ("mixed",)
NAMES = ("masked", "autoregressive", "block", "uniform", "mixed")
NOISED = (*MASKED, *BLOCK, "uniform", *MIXED)
WITHOUT_FUTURE = ("autoregressive", *BLOCK)
"""Objectives in which no token depends on all tokens behind it."""
EXACT = ("autoregressive",)
"""Objectives whose bound is the likelihood itself."""

BOUNDS = ("nelbo", "any_order")
"""Weights of which the loss estimates the bound."""
SCHEDULES_OF_RECIPES = {"md4": ("cosine_md4",)}
"""Noise schedules that a recipe knows beside its default one."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(Section):
    """The objective by name, and its settings: noise schedule, views and the logits that count."""

    name: str = identity("what is minimised", default="masked", choices=NAMES)
    noise_schedule: str = identity(
        "how the mask probability p depends on t",
        default="linear",
        choices=("linear", "cosine_md4", "cosine_bd3", "polynomial", "sqrt", "spindle"),
        variants=NOISED,
    )
    noise_exponent: float = identity(
        "k of the noise schedule polynomial, p rising as t^k", default=1.0, minimum=1, variants=NOISED
    )
    spindle_strength: float = identity(
        "lambda of the noise schedule spindle, which masks tokens of much information first; its loss is not a bound",
        default=0.3,
        above=0,
        maximum=1,
        variants=MASKED,
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
    mask_counts: str = identity(
        "whether each token is masked by itself, or the noise level fixes the number of masks of a row",
        default="independent",
        choices=("independent", "exact"),
        variants=MASKED,
    )
    time_sampling: str = identity(
        "how the noise levels of a batch are drawn: spread evenly over it, one by one, or spread with the density of "
        "mask probabilities that has the least variance where every token costs the same, under any noise schedule",
        default="stratified",
        choices=("stratified", "uniform", "importance"),
        variants=MASKED,
    )
    random_length_fraction: float = identity(
        "share of the samples that is cut to a random length; the rest of such a row is neither seen nor scored",
        default=0.0,
        minimum=0,
        maximum=1,
        variants=MASKED,
    )
    recipe: str | None = identity(
        "loss of a published system to the digit, in place of the settings of schedule, weight, times and masks",
        default=None,
        choices=("llada", "mdlm", "md4", "megadlms", "dream"),
        variants=MASKED,
    )
    complementary: bool | None = identity(
        "two views of each sample, the second masking what the first leaves visible (in each block); null means true "
        "for masked, false with objective.recipe and for block",
        default=None,
        variants=MASKED + BLOCK,
    )
    complementary_until_tokens: int | None = identity(
        "train single views from the first step that begins when so many tokens, padding included, were consumed",
        default=None,
        minimum=1,
        unit="tokens",
        variants=MASKED + BLOCK,
    )
    block_size: int = identity(
        "tokens of a diffusion block; 1 is autoregressive", default=32, minimum=1, unit="tokens", variants=BLOCK
    )
    block_schedule: list[str] = identity(
        "block sizes by the step or token from which on they hold, in place of block_size: a list of START:SIZE, L for "
        "the sequence length, where the clean half is left out",
        default=[],
        variants=BLOCK,
    )
    block_schedule_unit: str = identity(
        "what the starts of block_schedule count, completed steps or consumed tokens with padding",
        default="steps",
        choices=("steps", "tokens"),
        variants=BLOCK,
    )
    block_time: str = identity(
        "whether each block has a noise level of its own, spread within the row and over the batch, or drawn by "
        "itself; or the row has one",
        default="block",
        choices=("block", "sequence", "independent"),
        variants=BLOCK,
    )
    clip_low: float = identity(
        "lower end of the window that mask probabilities are drawn from; a clipped loss is not a bound",
        default=0.0,
        minimum=0,
        below=1,
        variants=BLOCK,
    )
    clip_high: float = identity(
        "upper end of the window that mask probabilities are drawn from",
        default=1.0,
        above=0,
        maximum=1,
        variants=BLOCK,
    )
    forced_mask: bool = identity(
        "a block in which nothing is masked gets one mask; such a loss is not a bound", default=False, variants=BLOCK
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
    corruption: str = identity(
        "masks and random tokens whose share follows the log-SNR; or masks, and random tokens in place of visible ones",
        default="log_snr",
        choices=("log_snr", "edit"),
        variants=MIXED,
    )
    uniform_slope: float = identity(
        "a of corruption log_snr, whose share of random tokens is sigmoid(a * log((1 - p)/p) + b)",
        default=1.0,
        minimum=0,
        maximum=1,
        variants=MIXED,
    )
    uniform_shift: float = identity("b of corruption log_snr", default=0.0, variants=MIXED)
    edit_fraction: float = identity(
        "chance that corruption edit replaces a visible token by a random one",
        default=0.1,
        above=0,
        below=1,
        variants=MIXED,
    )
    edit_weight: float = identity(
        "weight of a replaced token's cross entropy, of corruption edit", default=1.0, above=0, variants=MIXED
    )
    mask_logit: str = identity(
        "whether the mask token's logit enters the softmax", default="excluded", choices=("excluded", "included")
    )
    z_loss_weight: float = identity(
        "weight of the z-loss: the squared logarithm of the softmax's normaliser at each scored position; 0 for none",
        default=0.0,
        minimum=0,
    )

    def __post_init__(self) -> None:
        if self.complementary is None and self.has_meaning("complementary"):
            object.__setattr__(self, "complementary", self.name == "masked" and self.recipe is None)

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
        if self.time_sampling == "importance" and self.weight not in BOUNDS:
            yield Problem(
                key="objective.time_sampling",
                because=f"but objective.weight is {self.weight}, which bounds nothing that could be sampled for",
                allowed=f"stratified, uniform; or importance with objective.weight={'|'.join(BOUNDS)}",
            )
        if self.noise_schedule == "spindle":
            yield from self._spindle_problems()
        if self.complementary_until_tokens is not None and self.complementary is False:
            yield Problem(
                key="objective.complementary_until_tokens",
                because="but objective.complementary is false, so there is no pair to end",
                allowed="null; or an integer >= 1 with objective.complementary=true",
            )
        if self.recipe is not None and self.has_meaning("recipe"):
            yield from self._recipe_problems(self.recipe)
        if self.name in BLOCK:
            yield from self._block_problems(config.training.sequence_length)

    def _block_problems(self, sequence_length: int) -> Iterator[Problem]:
        if self.clip_low >= self.clip_high:
            yield Problem(
                key="objective.clip_low",
                because=f"but objective.clip_high is {self.clip_high:g}",
                allowed=f"less than {self.clip_high:g}",
            )
        problems = list(block_schedule_problems(self.block_schedule, sequence_length))
        yield from problems
        if problems or not self.block_schedule:
            return
        [size] = [field.default for field in fields(self) if field.name == "block_size"]
        if self.block_size != size:
            yield Problem(
                key="objective.block_size",
                because="but objective.block_schedule gives the sizes",
                allowed=f"{size}, its default; or objective.block_schedule=[]",
            )
        one_block = any(size == sequence_length for _, size in block_phases(self.block_schedule, sequence_length))
        only_blocks = {
            "diffusion_weight": None,
            "forced_mask": False,
            "clip_low": 0.0,
            "clip_high": 1.0,
        }
        for name, default in only_blocks.items():
            if one_block and getattr(self, name) != default:
                yield Problem(
                    key=f"objective.{name}",
                    because="but objective.block_schedule has a phase of one block a row, which is masked diffusion "
                    "without a clean half",
                    allowed=f"{'null' if default is None else str(default).lower()}; or no such phase",
                )

    def _spindle_problems(self) -> Iterator[Problem]:
        if self.name not in MASKED:
            yield Problem(
                key="objective.noise_schedule",
                because=f"but objective.name is {self.name}; spindle is a schedule of masked diffusion",
                allowed="linear, cosine_md4, cosine_bd3, polynomial, sqrt; or spindle with objective.name=masked",
            )
        defaults = {field.name: field.default for field in fields(self)}
        for name in ("weight", "mask_counts"):
            if self.name in MASKED and getattr(self, name) != defaults[name]:
                yield Problem(
                    key=f"objective.{name}",
                    because="but objective.noise_schedule is spindle, which has its own weight for each token",
                    allowed=f"{defaults[name]}; or another objective.noise_schedule",
                )
        if self.time_sampling == "importance":
            yield Problem(
                key="objective.time_sampling",
                because="but objective.noise_schedule is spindle, which has no single mask probability",
                allowed="stratified, uniform; or another objective.noise_schedule",
            )

    def _recipe_problems(self, recipe: str) -> Iterator[Problem]:
        if self.complementary:
            yield Problem(
                key="objective.complementary",
                because=f"but objective.recipe is {recipe}, which trains one view of a sample",
                allowed="false or null; or objective.recipe=null",
            )
        defaults = {field.name: field.default for field in fields(self)}
        for name in ("noise_schedule", "weight", "mask_counts", "time_sampling"):
            value, own = getattr(self, name), SCHEDULES_OF_RECIPES.get(recipe, ()) if name == "noise_schedule" else ()
            if value != defaults[name] and value not in own:
                yield Problem(
                    key=f"objective.{name}",
                    because=f"but objective.recipe is {recipe}, which has its own",
                    allowed=f"{', '.join((str(defaults[name]), *own))}; or objective.recipe=null",
                )

    def settings(self, *, isolate_documents: bool = False) -> dict[str, Any]:
        """The name and the settings that have a meaning for it.

        Args:
            isolate_documents: data.isolate_documents.
        """
        chosen = {field.name: getattr(self, field.name) for field in fields(self) if self.has_meaning(field.name)}
        return chosen | ({"isolate_documents": True} if isolate_documents else {})

    def has_meaning(self, name: str) -> bool:
        """True if a key of this section has a meaning for the chosen objective."""
        [setting] = [field.metadata["setting"] for field in fields(self) if field.name == name]
        assert isinstance(setting, Setting)
        return setting.variants is None or self.name in setting.variants
