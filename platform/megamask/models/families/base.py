"""A checkpoint family: how a published architecture names its numbers and its tensors.

A family is data. It states which architectures it covers, under which keys config.json holds the numbers of a
`ModelSpec`, which switches must have which value because the network here has no other, and how each canonical tensor
(models/initial_weights.py: unfused Llama names) is called in the published files. No torch, no files: reading and
writing weights is the conversion room's.

Sources: the projects' own configuration classes and state dictionaries, named in each family's file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from megamask.errors import UsageError
from megamask.models.families.experts import ExpertKeys
from megamask.models.families.numbers import boolean, integer, real, rope_theta, unsupported
from megamask.models.spec import ModelSpec

AttentionKind = Literal["causal", "bidirectional", "block_causal"]

VOCABULARY_MULTIPLE = 128
"""Rows of an imported embedding are padded to a multiple of this on devices, as a run's own are by default."""


@dataclass(frozen=True, kw_only=True)
class ConfigKeys:
    """Keys of config.json that hold the numbers of a `ModelSpec`; the defaults are Llama's.

    Args:
        num_query_groups, head_dim: optional in config.json, then num_attention_heads and hidden / heads.
        rope_theta: also read from `rope_parameters.rope_theta`, where newer files hold it.
        rotary_fraction: None where all channels of a head turn.
        block_size: the block length of a block-diffusion model; None where the family has none.
    """

    num_layers: str = "num_hidden_layers"
    hidden_size: str = "hidden_size"
    ffn_hidden_size: str = "intermediate_size"
    num_attention_heads: str = "num_attention_heads"
    num_query_groups: str = "num_key_value_heads"
    head_dim: str | None = "head_dim"
    vocab_size: str = "vocab_size"
    max_sequence_length: str = "max_position_embeddings"
    norm_eps: str = "rms_norm_eps"
    rope_theta: str = "rope_theta"
    tie_embeddings: str = "tie_word_embeddings"
    init_std: str = "initializer_range"
    rotary_fraction: str | None = None
    block_size: str | None = None


@dataclass(frozen=True, kw_only=True)
class TokenIds:
    """Special ids of a published model; None where its files name none."""

    mask: int | None = None
    eos: int | None = None
    pad: int | None = None
    bos: int | None = None

    def to_config(self) -> dict[str, int]:
        """The ids under the keys of config.json; unknown ones are left out."""
        return {
            f"{item.name}_token_id": value for item in fields(self) if (value := getattr(self, item.name)) is not None
        }


@dataclass(frozen=True, kw_only=True)
class Family:
    """One published architecture.

    Args:
        name: what users and records call it.
        architectures: values of `architectures[0]` that it covers; the first one is written.
        model_type: written to config.json.
        merged_model_type: of a file with merged experts; None where it is the same.
        keys: names of the numbers.
        qk_norm, qkv_bias: fixed by the architecture.
        switches: key -> the one value that the network here implements, or a tuple of such values, of which the first
            is written; a key that is absent or null is fine.
        hub_name: a canonical tensor's name in the published files.
        fused_name: inside a layer, of the one tensor that holds all queries, then all keys, then all values; None where
            they are three.
        experts: keys of the experts; None for a dense architecture.
        attention: what the published weights were trained with.
        target_shift: whether the logits at a position predict the token after it.
        default_block_size: of the published models, used where config.json names none.
        ids: special ids of the published models, used where config.json names none.
        extra: further keys of config.json, written as they are.
        plain_twin: name of the family that loads the same weights without remote code, if it is another one.
    """

    name: str
    architectures: tuple[str, ...]
    model_type: str
    merged_model_type: str | None = None
    keys: ConfigKeys = field(default_factory=ConfigKeys)
    qk_norm: bool = False
    qkv_bias: bool = False
    switches: Mapping[str, Any] = field(default_factory=dict)
    hub_name: Callable[[str], str] = lambda canonical: canonical
    fused_name: str | None = None
    experts: ExpertKeys | None = None
    attention: AttentionKind = "causal"
    target_shift: bool = False
    default_block_size: int | None = None
    ids: TokenIds = field(default_factory=TokenIds)
    extra: Mapping[str, Any] = field(default_factory=dict)
    plain_twin: str | None = None

    def spec(self, config: Mapping[str, Any]) -> ModelSpec:
        """The network that a config.json describes.

        Raises:
            UsageError: a number is missing or impossible, or a switch asks for what the network here has not.
        """
        for key, allowed in self.switches.items():
            if config.get(key) is not None and config[key] not in _values(allowed):
                listed = " or ".join(repr(value) for value in _values(allowed))
                raise unsupported(f"{key} is {config[key]!r}", f"{listed}, or no such key")
        keys = self.keys
        hidden, heads, layers = (
            integer(config, key) for key in (keys.hidden_size, keys.num_attention_heads, keys.num_layers)
        )
        head_dim = config.get(keys.head_dim) if keys.head_dim is not None else None
        if head_dim is None and hidden % heads:
            raise unsupported(f"{keys.hidden_size} is {hidden} and {keys.num_attention_heads} is {heads}", "a multiple")
        vocab_size = integer(config, keys.vocab_size)
        return ModelSpec(
            num_layers=layers,
            hidden_size=hidden,
            ffn_hidden_size=integer(config, keys.ffn_hidden_size),
            num_attention_heads=heads,
            num_query_groups=heads
            if config.get(keys.num_query_groups) is None
            else integer(config, keys.num_query_groups),
            head_dim=hidden // heads if head_dim is None else integer(config, str(keys.head_dim)),
            qk_norm=self.qk_norm,
            qkv_bias=self.qkv_bias,
            tie_embeddings=boolean(config, keys.tie_embeddings),
            rope_theta=rope_theta(config, keys.rope_theta),
            norm_eps=real(config, keys.norm_eps),
            init_std=real(config, keys.init_std, default=0.02),
            vocab_size=vocab_size,
            padded_vocab_size=-(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE,
            max_sequence_length=integer(config, keys.max_sequence_length),
            rotary_fraction=self._rotary_fraction(config),
            experts=None if self.experts is None else self.experts.spec(config, layers),
        )

    def _rotary_fraction(self, config: Mapping[str, Any]) -> float:
        key = self.keys.rotary_fraction
        for section in (config, config.get("rope_parameters") or {}):
            value = section.get(key or "partial_rotary_factor")
            if value is not None and key is None and value != 1:
                raise unsupported(f"partial_rotary_factor is {value!r}", "1, or no such key")
            if value is not None:
                return real(section, key or "partial_rotary_factor")
        return 1.0

    def token_ids(self, config: Mapping[str, Any]) -> TokenIds:
        """Special ids: those of config.json, else those of the published models that fit the vocabulary."""
        found: dict[str, int | None] = {}
        for item in fields(TokenIds):
            value = config.get(f"{item.name}_token_id")
            if isinstance(value, list):  # several ends of a turn; the first one ends a document
                value = value[0] if value else None
            if value is not None and (type(value) is not int or not 0 <= value < integer(config, self.keys.vocab_size)):
                raise unsupported(f"{item.name}_token_id is {value!r}", "an id below the size of the vocabulary")
            default = getattr(self.ids, item.name)
            fits = default is not None and default < integer(config, self.keys.vocab_size)
            found[item.name] = value if value is not None else (default if fits else None)
        return TokenIds(**found)

    def block_size(self, config: Mapping[str, Any]) -> int | None:
        """Tokens of a diffusion block that the weights were trained with; None for another kind of model."""
        if self.keys.block_size is None or config.get(self.keys.block_size) is None:
            return self.default_block_size
        return integer(config, self.keys.block_size)

    def config(
        self, spec: ModelSpec, ids: TokenIds, *, block_size: int | None = None, has_merged_experts: bool = False
    ) -> dict[str, Any]:
        """A config.json for a network of this family.

        Raises:
            UsageError: the network has something that this family has not, or lacks it: q/k norms, biases, experts,
                partial rotary positions; names it.
        """
        for name in ("qk_norm", "qkv_bias"):
            if getattr(spec, name) != getattr(self, name):
                raise UsageError(
                    f"the network has model.{name} {getattr(spec, name)}, family {self.name} has "
                    f"{getattr(self, name)}. Nothing was written.",
                    hint="choose a family that fits, or leave --family out",
                )
        keys = self.keys
        if (spec.experts is None) != (self.experts is None):
            raise UsageError(
                f"the network has {'no ' if spec.experts is None else ''}experts, family {self.name} "
                f"{'needs them' if spec.experts is None else 'cannot hold them'}. Nothing was written."
            )
        if spec.rotary_fraction != 1.0 and keys.rotary_fraction is None:
            raise UsageError(
                f"the network has model.rotary_fraction {spec.rotary_fraction}, family {self.name} turns all channels "
                "of a head. Nothing was written."
            )
        is_renamed = has_merged_experts and self.merged_model_type is not None
        document: dict[str, Any] = {
            "architectures": [self.architectures[0]],
            "model_type": self.merged_model_type if is_renamed else self.model_type,
        }
        document |= {key: _values(allowed)[0] for key, allowed in self.switches.items()} | dict(self.extra)
        for item in fields(ConfigKeys):
            key = getattr(keys, item.name)
            if key is not None and item.name not in ("rope_theta", "block_size"):
                document[key] = getattr(spec, item.name)
        if spec.experts is not None and self.experts is not None:
            document |= self.experts.config(spec.experts, spec.num_layers, self.name)
        # both spellings: transformers 5 reads rope_parameters, older versions and remote code read rope_theta
        document |= {keys.rope_theta: spec.rope_theta}
        document["rope_parameters"] = {"rope_type": "default", "rope_theta": spec.rope_theta}
        if keys.rotary_fraction is not None:
            document["rope_parameters"][keys.rotary_fraction] = spec.rotary_fraction
        if keys.block_size is not None and block_size is not None:
            document[keys.block_size] = block_size
        return document | ids.to_config()


def _values(allowed: Any) -> tuple[Any, ...]:
    return allowed if isinstance(allowed, tuple) else (allowed,)
