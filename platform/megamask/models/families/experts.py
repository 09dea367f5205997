"""Experts of a published architecture: how config.json describes them and their router."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megamask.errors import UsageError
from megamask.models.experts import ExpertSpec
from megamask.models.families.numbers import boolean, integer, real, unsupported

_GROUP_SCORES = 2
"""The published routers rank a group of experts by the sum of its two best scores."""


@dataclass(frozen=True, kw_only=True)
class ExpertKeys:
    """Keys of config.json that hold the numbers of an `ExpertSpec`; the defaults are Qwen3-MoE's.

    Args:
        ffn_hidden_size: width of an expert.
        num_shared, scale, num_groups, topk_groups: None where the architecture has no such thing.
        normalizes: whether the weights of a token's experts sum to 1; None where they do if there are several.
        dense_layers: where the first dense layers are counted: a list of the layers' numbers (Qwen), a list with 0 or 1
            for each layer (LLaDA-MoE), or their number (LLaDA2).
        score, has_bias: fixed by the architecture.
    """

    num_experts: str = "num_experts"
    topk: str = "num_experts_per_tok"
    ffn_hidden_size: str = "moe_intermediate_size"
    normalizes: str | None = "norm_topk_prob"
    num_shared: str | None = None
    scale: str | None = None
    num_groups: str | None = None
    topk_groups: str | None = None
    dense_layers: Literal["mlp_only_layers", "moe_layer_freq", "first_k_dense_replace"] = "mlp_only_layers"
    score: str = "softmax"
    has_bias: bool = False

    def spec(self, config: Mapping[str, Any], num_layers: int) -> ExpertSpec:
        """The experts that a config.json describes; settings of training alone, as the balance loss, are left out.

        Raises:
            UsageError: a number is missing or impossible, or the router is one that the network here has not.
        """
        # newer files of Qwen's models name it after the local experts
        num_experts = "num_local_experts" if config.get(self.num_experts) is None else self.num_experts
        topk, groups = integer(config, self.topk), self._optional(config, self.num_groups)
        topk_groups = self._optional(config, self.topk_groups)
        if groups > 1 and topk != _GROUP_SCORES * topk_groups:
            raise unsupported(
                f"{self.topk} is {topk} and {self.topk_groups} is {topk_groups}",
                f"{_GROUP_SCORES} experts for each group that a token chooses among",
            )
        return ExpertSpec(
            num_experts=integer(config, num_experts),
            topk=topk,
            ffn_hidden_size=integer(config, self.ffn_hidden_size),
            num_shared=0 if self.num_shared is None else integer(config, self.num_shared, minimum=0, default=0),
            num_dense_layers=self._num_dense(config, num_layers),
            score=self.score,
            normalizes=topk > 1 if self.normalizes is None else boolean(config, self.normalizes),
            scale=1.0 if self.scale is None else real(config, self.scale, 1.0),
            num_groups=groups,
            topk_groups=topk_groups,
            has_bias=self.has_bias,
        )

    def config(self, experts: ExpertSpec, num_layers: int, family: str) -> dict[str, Any]:
        """The keys of config.json that describe experts.

        Raises:
            UsageError: the architecture cannot hold these experts; names the setting.
        """
        fixed: dict[str, Any] = {"choice": "tokens", "score": self.score, "has_bias": self.has_bias}
        absent: dict[str, Any] = {"num_shared": 0, "scale": 1.0, "num_groups": 1, "topk_groups": 1}
        absent |= {"normalizes": experts.topk > 1}
        fixed |= {name: value for name, value in absent.items() if getattr(self, name) is None}
        for name, value in fixed.items():
            if getattr(experts, name) != value:
                raise UsageError(
                    f"the experts' router has {name} {getattr(experts, name)!r}, family {family} has {value!r}. "
                    "Nothing was written.",
                    hint="choose a family that fits, or leave --family out",
                )
        if experts.num_groups > 1 and experts.topk != _GROUP_SCORES * experts.topk_groups:
            raise UsageError(
                f"a token has {experts.topk} experts of {experts.topk_groups} groups, family {family} has "
                f"{_GROUP_SCORES} of each. Nothing was written."
            )
        names = ("num_experts", "topk", "ffn_hidden_size", *absent)
        found = {key: getattr(experts, name) for name in names if (key := getattr(self, name)) is not None}
        return found | self._dense(experts.num_dense_layers, num_layers)

    def _optional(self, config: Mapping[str, Any], key: str | None) -> int:
        return 1 if key is None else integer(config, key, default=1)

    def _num_dense(self, config: Mapping[str, Any], num_layers: int) -> int:
        """First layers that have no experts. Dense layers elsewhere are refused."""
        key = self.dense_layers
        if key == "first_k_dense_replace":
            return integer(config, key, minimum=0, default=0)
        listed = config.get(key) or []
        if key == "mlp_only_layers":
            if config.get("decoder_sparse_step", 1) != 1:
                raise unsupported(f"decoder_sparse_step is {config['decoder_sparse_step']}", "1")
            if listed != list(range(len(listed))):
                raise unsupported(f"{key} is {listed!r}", "the first layers, or none")
            return len(listed)
        if listed and listed != [int(layer >= listed.count(0)) for layer in range(num_layers)]:
            raise unsupported(f"{key} is {listed!r}", f"for {num_layers} layers: 0 for the first dense ones, then 1")
        return listed.count(0)

    def _dense(self, count: int, num_layers: int) -> dict[str, Any]:
        if self.dense_layers == "first_k_dense_replace":
            return {self.dense_layers: count}
        if self.dense_layers == "mlp_only_layers":
            return {self.dense_layers: list(range(count)), "decoder_sparse_step": 1}
        return {self.dense_layers: [int(layer >= count) for layer in range(num_layers)]}
