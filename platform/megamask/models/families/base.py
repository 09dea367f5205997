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
        keys: names of the numbers.
        qk_norm, qkv_bias: fixed by the architecture.
        switches: key -> the one value that the network here implements; an absent key is fine.
        hub_name: a canonical tensor's name in the published files.
        attention: what the published weights were trained with.
        target_shift: whether the logits at a position predict the token after it.
        ids: special ids of the published models, used where config.json names none.
        extra: further keys of config.json, written as they are.
        plain_twin: name of the family that loads the same weights without remote code, if it is another one.
    """

    name: str
    architectures: tuple[str, ...]
    model_type: str
    keys: ConfigKeys = field(default_factory=ConfigKeys)
    qk_norm: bool = False
    qkv_bias: bool = False
    switches: Mapping[str, Any] = field(default_factory=dict)
    hub_name: Callable[[str], str] = lambda canonical: canonical
    attention: AttentionKind = "causal"
    target_shift: bool = False
    ids: TokenIds = field(default_factory=TokenIds)
    extra: Mapping[str, Any] = field(default_factory=dict)
    plain_twin: str | None = None

    def spec(self, config: Mapping[str, Any]) -> ModelSpec:
        """The network that a config.json describes.

        Raises:
            UsageError: a number is missing or impossible, or a switch asks for what the network here has not.
        """
        for key, allowed in self.switches.items():
            if config.get(key, allowed) != allowed:
                raise unsupported(f"{key} is {config[key]!r}", f"{allowed!r}, or no such key")
        keys, hidden, heads = self.keys, 0, 0
        hidden, heads = (_integer(config, key) for key in (keys.hidden_size, keys.num_attention_heads))
        head_dim = config.get(keys.head_dim) if keys.head_dim is not None else None
        if head_dim is None and hidden % heads:
            raise unsupported(f"{keys.hidden_size} is {hidden} and {keys.num_attention_heads} is {heads}", "a multiple")
        vocab_size = _integer(config, keys.vocab_size)
        return ModelSpec(
            num_layers=_integer(config, keys.num_layers),
            hidden_size=hidden,
            ffn_hidden_size=_integer(config, keys.ffn_hidden_size),
            num_attention_heads=heads,
            num_query_groups=heads
            if config.get(keys.num_query_groups) is None
            else _integer(config, keys.num_query_groups),
            head_dim=hidden // heads if head_dim is None else _integer(config, str(keys.head_dim)),
            qk_norm=self.qk_norm,
            qkv_bias=self.qkv_bias,
            tie_embeddings=_boolean(config, keys.tie_embeddings),
            rope_theta=rope_theta(config, keys.rope_theta),
            norm_eps=_real(config, keys.norm_eps),
            init_std=_real(config, keys.init_std, default=0.02),
            vocab_size=vocab_size,
            padded_vocab_size=-(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE,
            max_sequence_length=_integer(config, keys.max_sequence_length),
        )

    def token_ids(self, config: Mapping[str, Any]) -> TokenIds:
        """Special ids: those of config.json, else those of the published models that fit the vocabulary."""
        found: dict[str, int | None] = {}
        for item in fields(TokenIds):
            value = config.get(f"{item.name}_token_id")
            if isinstance(value, list):  # several ends of a turn; the first one ends a document
                value = value[0] if value else None
            if value is not None and (
                type(value) is not int or not 0 <= value < _integer(config, self.keys.vocab_size)
            ):
                raise unsupported(f"{item.name}_token_id is {value!r}", "an id below the size of the vocabulary")
            default = getattr(self.ids, item.name)
            fits = default is not None and default < _integer(config, self.keys.vocab_size)
            found[item.name] = value if value is not None else (default if fits else None)
        return TokenIds(**found)

    def block_size(self, config: Mapping[str, Any]) -> int | None:
        """Tokens of a diffusion block that the weights were trained with; None for another kind of model."""
        if self.keys.block_size is None or config.get(self.keys.block_size) is None:
            return None
        return _integer(config, self.keys.block_size)

    def config(self, spec: ModelSpec, ids: TokenIds, *, block_size: int | None = None) -> dict[str, Any]:
        """A config.json for a network of this family.

        Raises:
            UsageError: the network has q/k norms or biases that this family has not, or lacks them; or it has experts
                or partial rotary positions.
        """
        for name in ("qk_norm", "qkv_bias"):
            if getattr(spec, name) != getattr(self, name):
                raise UsageError(
                    f"the network has model.{name} {getattr(spec, name)}, family {self.name} has "
                    f"{getattr(self, name)}. Nothing was written.",
                    hint="choose a family that fits, or leave --family out",
                )
        if spec.experts is not None or spec.rotary_fraction != 1.0:
            reason = "experts" if spec.experts is not None else f"model.rotary_fraction {spec.rotary_fraction}"
            raise UsageError(f"the network has {reason}, which family {self.name} cannot hold. Nothing was written.")
        keys = self.keys
        document: dict[str, Any] = {"architectures": [self.architectures[0]], "model_type": self.model_type}
        document |= dict(self.switches) | dict(self.extra)
        for item in fields(ConfigKeys):
            key = getattr(keys, item.name)
            if key is not None and item.name not in ("rope_theta", "block_size"):
                document[key] = getattr(spec, item.name)
        # both spellings: transformers 5 reads rope_parameters, older versions and remote code read rope_theta
        document |= {keys.rope_theta: spec.rope_theta}
        document |= {"rope_parameters": {"rope_type": "default", "rope_theta": spec.rope_theta}}
        if keys.block_size is not None and block_size is not None:
            document[keys.block_size] = block_size
        return document | ids.to_config()


def rope_theta(config: Mapping[str, Any], key: str = "rope_theta") -> float:
    """Base of the rotary frequencies.

    A default is never assumed: those of the published classes are wrong for some of the published weights.

    Raises:
        UsageError: no base is given, two differ, or the positions are scaled.
    """
    nested = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or {}
    for name, section in (("rope_parameters", nested), ("rope_scaling", scaling)):
        if not isinstance(section, Mapping):
            raise unsupported(f"{name} is {section!r}", "an object, or null")
        kind = section.get("rope_type", section.get("type", "default"))
        if kind != "default":
            raise unsupported(f"{name} scales the rotary positions ({kind})", "rope_type default: unscaled positions")
    given = [value for value in (config.get(key), nested.get("rope_theta")) if value is not None]
    if not given:
        raise unsupported(f"neither {key} nor rope_parameters.rope_theta is given", "one of the two")
    if len({float(value) for value in given}) > 1:
        raise unsupported(f"{key} is {given[0]} and rope_parameters.rope_theta is {given[1]}", "one value")
    return float(given[0])


def unsupported(what: str, allowed: str) -> UsageError:
    """The refusal of a config.json."""
    return UsageError(
        f"config.json: {what}; supported: {allowed}. Nothing was converted.",
        hint="docs/guides/conversion.md lists what each family may contain",
    )


def _integer(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise unsupported(f"{key} is {value!r}" if key in config else f"{key} is missing", "a positive integer")
    return value


def _real(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = config.get(key, default)
    if type(value) not in (int, float) or not value > 0:
        raise unsupported(f"{key} is {value!r}" if key in config else f"{key} is missing", "a positive number")
    return float(value)


def _boolean(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key, False)
    if type(value) is not bool:
        raise unsupported(f"{key} is {value!r}", "true or false")
    return value
