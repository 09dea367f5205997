"""What no single key can know: whether the settings fit one another. Asked before any process or device is taken."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from megamask.config.identity import value_of
from megamask.config.load import DEFAULT_ORIGIN, OVERRIDE_ORIGIN
from megamask.config.problem import Problem, divisors, listed
from megamask.config.schema.model import ModelConfig
from megamask.config.schema.roots import PrepareConfig, TrainConfig
from megamask.config.secrets import shown
from megamask.config.validate_training import batch_problems, learning_rate_problems
from megamask.errors import UsageError

# The shape law: lengths are multiples of lcm(16, 2*cp*tp); cp is 1 as long as there is no context parallelism.
_SHAPE_UNIT = 16
# The noise law numbers the draws of a row: 256 * draw + purpose is one 32-bit word.
_MOST_DRAWS = 2**24


def validate_train(config: TrainConfig, origins: Mapping[str, str] | None = None) -> None:
    """Refuses a training config whose parts do not fit.

    Args:
        origins: of `Loaded`, so that the message can name file and line.

    Raises:
        UsageError: the first problem: key and value, why, what is allowed, where to change it.
    """
    parts = (_corpora, _shape, _model, _layout)
    for check in (*parts, batch_problems, learning_rate_problems, _training, _preview, _retention):
        for problem in check(config):
            raise _refusal(config, problem, origins)


def validate_prepare(config: PrepareConfig, origins: Mapping[str, str] | None = None) -> None:
    """Refuses a config of a corpus' preparation whose parts do not fit; raises like `validate_train`."""
    for problem in _prepare(config):
        raise _refusal(config, problem, origins)


def effective_query_groups(model: ModelConfig) -> int:
    """Key and value heads of each layer."""
    return model.num_attention_heads if model.num_query_groups is None else model.num_query_groups


def length_unit(tensor_parallel_size: int) -> int:
    """The number that sequence lengths are multiples of, by the shape law."""
    return math.lcm(_SHAPE_UNIT, 2 * tensor_parallel_size)


def allowed_tensor_parallel_sizes(config: TrainConfig) -> list[int]:
    """The tensor-parallel sizes that divide everything which such ranks share, ascending."""
    shared = math.gcd(*(count for _, count in _shared_by_tensor_ranks(config)))
    return [size for size in divisors(shared) if config.training.sequence_length % length_unit(size) == 0]


def _shared_by_tensor_ranks(config: TrainConfig) -> list[tuple[str, int]]:
    model = config.model
    return [
        ("model.num_attention_heads", model.num_attention_heads),
        ("model.num_query_groups", effective_query_groups(model)),
        ("model.ffn_hidden_size", model.ffn_hidden_size),
        ("model.vocab_padding_multiple", model.vocab_padding_multiple),
    ]


def _corpora(config: TrainConfig) -> Iterator[Problem]:
    corpora = config.data.corpora
    if len(corpora) != 1:
        yield Problem(
            key="data.corpora",
            because=f"which has {len(corpora)} entries; mixtures are not built yet",
            allowed="exactly one entry, name -> folder (data.corpora.NAME=null takes one away)",
        )
    for name, folder in corpora.items():
        if not folder:
            yield Problem(
                key="data.corpora", because=f"and its entry {name} names no folder", allowed="a corpus folder"
            )


def _shape(config: TrainConfig) -> Iterator[Problem]:
    tensor, length = config.layout.tensor_parallel_size, config.training.sequence_length
    if length % _SHAPE_UNIT != 0:
        yield _length_problem(
            "training.sequence_length", length, length_unit(tensor), "2 * layout.tensor_parallel_size"
        )


def _length_problem(key: str, length: int, unit: int, why: str) -> Problem:
    below, above = length - length % unit, length - length % unit + unit
    nearest = f"{below} or {above}" if below else f"{above}"
    return Problem(
        key=key,
        because=f"which is not a multiple of {unit} = lcm({_SHAPE_UNIT}, {why})",
        allowed=f"a multiple of {unit}; the nearest are {nearest}",
    )


def _model(config: TrainConfig) -> Iterator[Problem]:
    model = config.model
    heads, groups = model.num_attention_heads, effective_query_groups(model)
    if heads % groups != 0:
        yield Problem(
            key="model.num_query_groups",
            because=f"but model.num_attention_heads is {heads}",
            allowed=listed(divisors(heads)),
        )
    if model.head_dim is None and model.hidden_size % heads != 0:
        yield Problem(
            key="model.num_attention_heads",
            because=f"but model.hidden_size is {model.hidden_size} and model.head_dim is null",
            allowed=f"{listed(divisors(model.hidden_size))}; or set model.head_dim",
        )
    if model.head_dim is None and (model.hidden_size // heads) % 2 != 0:
        yield Problem(
            key="model.hidden_size",
            because=f"which gives {heads} heads of {model.hidden_size // heads} channels; rotary positions need pairs",
            allowed=f"a multiple of {2 * heads}; or set an even model.head_dim",
        )
    if model.head_dim is not None and model.head_dim % 2 != 0:
        yield Problem(key="model.head_dim", because="but rotary positions need pairs", allowed="an even number")


def _layout(config: TrainConfig) -> Iterator[Problem]:
    tensor, pipeline = config.layout.tensor_parallel_size, config.layout.pipeline_parallel_size
    length = config.training.sequence_length
    for key, count in _shared_by_tensor_ranks(config):
        if count % tensor != 0:
            yield _tensor_problem(config, f"but {key} is {count}")
    if length % length_unit(tensor) != 0:
        yield _tensor_problem(
            config, f"but training.sequence_length is {length}, not a multiple of lcm({_SHAPE_UNIT}, 2 * {tensor})"
        )
    if config.model.num_layers % pipeline != 0:
        yield Problem(
            key="layout.pipeline_parallel_size",
            because=f"but model.num_layers is {config.model.num_layers}",
            allowed=listed(divisors(config.model.num_layers)),
        )
    if config.layout.sequence_parallel and tensor == 1:
        yield Problem(
            key="layout.sequence_parallel",
            because="but layout.tensor_parallel_size is 1, so there are no ranks to share a sequence",
            allowed="false, or a layout.tensor_parallel_size above 1",
        )


def _tensor_problem(config: TrainConfig, because: str) -> Problem:
    sizes = listed(allowed_tensor_parallel_sizes(config))
    return Problem(key="layout.tensor_parallel_size", because=because, allowed=sizes)


def _training(config: TrainConfig) -> Iterator[Problem]:
    training = config.training
    if training.stop_after_step is not None and training.stop_after_step > training.steps:
        yield Problem(
            key="training.stop_after_step",
            because=f"but training.steps is {training.steps}",
            allowed=f"1 to {training.steps}, or null",
        )
    evaluation = config.evaluation
    if evaluation.draws * evaluation.replicates >= _MOST_DRAWS:
        yield Problem(
            key="evaluation.draws",
            because=f"which times evaluation.replicates = {evaluation.replicates} is more than the noise law numbers",
            allowed=f"at most {(_MOST_DRAWS - 1) // evaluation.replicates}",
        )
    capacity, length = training.head_capacity, training.sequence_length
    if capacity is None:
        return
    if capacity > length:
        yield Problem(
            key="training.head_capacity",
            because=f"but a sample has training.sequence_length = {length} tokens to score",
            allowed=f"1 to {length}, or null",
        )
    if capacity < length and config.objective.complementary:
        yield Problem(
            key="training.head_capacity",
            because=f"but objective.complementary scores every token of a full row, {length} of them, exactly once",
            allowed=f"{length} or null; less only with objective.complementary=false",
        )


def _preview(config: TrainConfig) -> Iterator[Problem]:
    """Whether a prompt fits is known only with the corpus' tokenizer: training/previewing.py."""
    preview, length = config.preview, config.training.sequence_length
    if preview.every_steps is None:
        return
    if not preview.prompts:
        yield Problem(
            key="preview.prompts",
            because="so there is nothing to continue",
            allowed="""at least one text (preview.prompts=[''] writes from nothing), or preview.every_steps=null""",
        )
    if preview.num_tokens > length:
        yield Problem(
            key="preview.num_tokens",
            because=f"but a row has training.sequence_length = {length} tokens, the prompt included",
            allowed=f"1 to {length}",
        )
    if preview.denoising_steps is not None and preview.denoising_steps > preview.num_tokens:
        yield Problem(
            key="preview.denoising_steps",
            because=f"but each step writes a token at least, and preview.num_tokens is {preview.num_tokens}",
            allowed=f"1 to {preview.num_tokens}, or null",
        )


def _retention(config: TrainConfig) -> Iterator[Problem]:
    checkpoint, every = config.checkpoint, config.evaluation.every_steps
    if checkpoint.keep_best == 0:
        return
    if every is None:
        yield Problem(
            key="checkpoint.keep_best",
            because="but evaluation.every_steps is null, so that no checkpoint's bound is measured",
            allowed="0, or any number with evaluation.every_steps set",
        )
        return
    steps, committed = config.training.steps, checkpoint.every_steps
    # the last step always commits, and with every_steps=null so does whatever step an attempt ends at
    if committed is not None and math.lcm(every, committed) > steps and steps % every != 0:
        yield Problem(
            key="checkpoint.keep_best",
            because=f"but no step up to training.steps is a multiple of both checkpoint.every_steps = {committed} and "
            f"evaluation.every_steps = {every}, and the last one is not measured",
            allowed="0, or any number with a checkpoint at an evaluated step",
        )


def _prepare(config: PrepareConfig) -> Iterator[Problem]:
    corpus, tokenizer = config.corpus, config.corpus.tokenizer
    if not corpus.inputs or not all(corpus.inputs):
        yield Problem(key="corpus.inputs", because="which names no text", allowed="at least one path or glob")
    if not corpus.output_dir:
        yield Problem(key="corpus.output_dir", because="which names no folder", allowed="a folder")
    if corpus.sequence_length % _SHAPE_UNIT != 0:
        yield _length_problem("corpus.sequence_length", corpus.sequence_length, length_unit(1), "2")
    if not corpus.jsonl_text_key:
        yield Problem(key="corpus.jsonl_text_key", because="which is empty", allowed="a key of the .jsonl lines")
    if (tokenizer.vocab_size is None) == (tokenizer.path is None):
        what = "both are set" if tokenizer.path is not None else "neither is set"
        yield Problem(
            key="corpus.tokenizer.vocab_size",
            because=f"and corpus.tokenizer.path is {shown(tokenizer.path)}: {what}",
            allowed="exactly one of them: vocab_size trains a tokenizer, path loads one",
        )
    names = ("eod_token", "pad_token", "mask_token")
    tokens = [getattr(tokenizer, name) for name in names]
    for index, (name, token) in enumerate(zip(names, tokens, strict=True)):
        key = f"corpus.tokenizer.{name}"
        if not token:
            yield Problem(key=key, because="which is empty", allowed="a string that no other special token has")
        if token in tokens[:index]:
            twin = names[tokens.index(token)]
            yield Problem(
                key=key, because=f"which corpus.tokenizer.{twin} is too", allowed="three special tokens that differ"
            )


def _refusal(config: Any, problem: Problem, origins: Mapping[str, str] | None) -> UsageError:
    value = shown(value_of(config, problem.key))
    return UsageError(
        f"{problem.key} is {value}, {problem.because}; allowed: {problem.allowed}. Nothing was started.",
        hint=_where_to_change(problem.key, origins),
    )


def _where_to_change(key: str, origins: Mapping[str, str] | None) -> str | None:
    if origins is None:
        return None
    origin = origins.get(key)
    if origin is None:  # a mapping: its entries have the origins
        origin = next((place for name, place in origins.items() if name.startswith(f"{key}.")), DEFAULT_ORIGIN)
    if origin == OVERRIDE_ORIGIN:
        return f"change {key} on the command line"
    if origin == DEFAULT_ORIGIN:
        return f"{key} stands at its default; set it in the config or as {key}=..."
    return f"change {key} in {origin}"
