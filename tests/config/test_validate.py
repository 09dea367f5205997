from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamask.config.rules.layout import allowed_tensor_parallel_sizes, length_unit
from megamask.config.schema.layout import shared_numbers
from megamask.config.validate import all_problems, validate_train
from megamask.errors import UsageError
from support.config_files import write_configs


def refused(train, refusal, *overrides):
    loaded = train(*overrides)
    return refusal(validate_train, loaded.config, loaded.origins)


# levels of 2, 4, 6 and 8 samples
RAMP = (
    "training.batch_size_ramp_start=2",
    "training.batch_size_ramp_increment=2",
    "training.batch_size_ramp_samples=100",
)
TOKENS = "optimizer.schedule_unit=tokens"
REFUSED_SCHEDULES = [
    (
        ("optimizer.warmup_tokens=9",),
        "optimizer.warmup_tokens is 9, but optimizer.schedule_unit is steps; allowed: 0, with optimizer.warmup_steps "
        "in its place; or optimizer.schedule_unit=tokens.",
    ),
    (("optimizer.decay_tokens=9",), "optimizer.decay_tokens is 9, but optimizer.schedule_unit is steps; allowed: 0"),
    ((TOKENS, "optimizer.warmup_steps=9"), "optimizer.warmup_steps is 9, but optimizer.schedule_unit is tokens"),
    ((TOKENS, "optimizer.decay_steps=9"), "optimizer.decay_steps is 9, but optimizer.schedule_unit is tokens"),
    (
        ("optimizer.lr_schedule=constant", "optimizer.decay_steps=5"),
        "optimizer.decay_steps is 5, but optimizer.lr_schedule is constant, which never falls; allowed: 0; or another "
        "optimizer.lr_schedule: wsd, inverse_sqrt.",
    ),
    (
        (TOKENS, "optimizer.lr_schedule=cosine", "optimizer.decay_tokens=5"),
        "optimizer.decay_tokens is 5, but optimizer.lr_schedule is cosine, which falls from the end of warm-up to "
        "training.steps; allowed: 0",
    ),
    (
        ("optimizer.lr_schedule=inverse_sqrt",),
        "optimizer.warmup_steps is 0, but optimizer.lr_schedule is inverse_sqrt, which after warm-up is peak * "
        "sqrt(warm-up / position); allowed: an integer >= 1.",
    ),
    ((TOKENS, "optimizer.lr_schedule=inverse_sqrt"), "optimizer.warmup_tokens is 0, but optimizer.lr_schedule is"),
    (
        ("optimizer.lr_schedule=constant", "optimizer.min_learning_rate=1e-4"),
        "optimizer.min_learning_rate is 0.0001, but optimizer.lr_schedule is constant, so that the rate never falls; "
        "allowed: 0; or another optimizer.lr_schedule: wsd, cosine, inverse_sqrt.",
    ),
    ((TOKENS, "optimizer.min_learning_rate=1e-4"), "optimizer.decay_tokens is 0, so that the rate never falls"),
]
REFUSED_RAMPS = [
    (
        RAMP[:2],
        "training.batch_size_ramp_samples is null, but training.batch_size_ramp_start is 2, and a ramp needs all three "
        "of training.batch_size_ramp_start, training.batch_size_ramp_increment, training.batch_size_ramp_samples; "
        "allowed: an integer >= 1; or null for all three, and every step has 8 samples.",
    ),
    (RAMP[1:], "training.batch_size_ramp_start is null, but training.batch_size_ramp_increment is 2"),
    (
        ("training.batch_size_ramp_start=8", *RAMP[1:]),
        "training.batch_size_ramp_start is 8, but the ramp ends at training.global_batch_size = 8; allowed: 1 to 7",
    ),
    (
        (*RAMP, "training.batch_size_ramp_increment=4"),
        "training.batch_size_ramp_increment is 4, but from training.batch_size_ramp_start = 2 to "
        "training.global_batch_size = 8 there are 6 samples; allowed: 1, 2, 3, 6.",
    ),
    (
        (*RAMP, "layout.data_parallel_size=4"),
        "layout.data_parallel_size is 4, but the batch-size ramp's level of 2 samples does not divide by it; "
        "allowed: 1, 2 (nearest: 2).",
    ),
    (
        (*RAMP, "training.micro_batch_size=4"),
        "training.micro_batch_size is 4, but each of 1 data-parallel ranks has 2 of the batch-size ramp's level of 2 "
        "samples; allowed: 1, 2 (nearest: 2).",
    ),
    (
        (*RAMP, "training.batch_size_ramp_start=4", "layout.data_parallel_size=2", "training.micro_batch_size=2"),
        "training.micro_batch_size is 2, but each of 2 data-parallel ranks has 3 of the batch-size ramp's level of 6 "
        "samples; allowed: 1.",
    ),
    ((*RAMP, "layout.data_parallel_size=3"), "layout.data_parallel_size is 3, but training.global_batch_size is 8"),
]


VIRTUAL = ("model.num_layers=4", "layout.pipeline_parallel_size=2", "layout.virtual_pipeline_parallel_size=2")
EXPERTS = ("model.num_experts=6", "model.expert_ffn_hidden_size=90")


@pytest.mark.promise("keep_best is allowed when the last step is evaluated")
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("layout.tensor_parallel_size=2", "layout.sequence_parallel=true"),
        ("layout.tensor_parallel_size=4",),
        ("layout.pipeline_parallel_size=2",),
        ("layout.data_parallel_size=8",),
        VIRTUAL,
        ("model.num_layers=7", "layout.pipeline_parallel_size=4", "layout.pipeline_split=balanced"),
        ("layout.context_parallel_size=2", "layout.tensor_parallel_size=4", "layout.data_parallel_size=8"),
        (*EXPERTS, "layout.data_parallel_size=2", "layout.expert_parallel_size=2"),
        (*EXPERTS, "layout.context_parallel_size=4", "layout.expert_parallel_size=2"),
        ("training.steps=1", "optimizer.warmup_steps=10", "optimizer.decay_steps=100"),
        ("training.stop_after_step=20",),
        ("training.head_chunk_rows=1",),
        ("model.head_dim=10",),
        ("optimizer.min_learning_rate=3e-3", "optimizer.decay_steps=5"),
        ("optimizer.lr_schedule=constant", "optimizer.warmup_steps=5"),
        ("optimizer.lr_schedule=cosine", "optimizer.min_learning_rate=1e-4"),
        ("optimizer.lr_schedule=inverse_sqrt", "optimizer.warmup_steps=1", "optimizer.min_learning_rate=1e-4"),
        ("optimizer.schedule_unit=tokens", "optimizer.warmup_tokens=5", "optimizer.decay_tokens=5"),
        (*RAMP, "layout.data_parallel_size=2"),
        (*RAMP, "training.micro_batch_size=2"),
        ("checkpoint.keep_best=1", "checkpoint.every_steps=4", "evaluation.every_steps=6"),
        ("checkpoint.keep_best=1", "checkpoint.every_steps=null", "evaluation.every_steps=3"),
        ("checkpoint.keep_best=1", "checkpoint.every_steps=7", "evaluation.every_steps=4"),  # step 20, the last
        ("checkpoint.keep_best=1", "checkpoint.every_steps=1000", "evaluation.every_steps=20"),
        ("training.global_batch_size=16777216",),  # 2^32 scored positions: nothing counts them in 32 bits
    ],
)
def test_config_that_fits_is_accepted(train, overrides):
    loaded = train(*overrides)
    validate_train(loaded.config, loaded.origins)


REFUSED = [
    *REFUSED_SCHEDULES,
    *REFUSED_RAMPS,
    (
        ("layout.tensor_parallel_size=3",),
        "layout.tensor_parallel_size is 3, but model.num_attention_heads is 4; allowed: 1, 2, 4 (nearest: 2).",
    ),
    (
        ("layout.tensor_parallel_size=4", "model.num_query_groups=2"),
        "layout.tensor_parallel_size is 4, but model.num_query_groups is 2; allowed: 1, 2 (nearest: 2).",
    ),
    (
        ("layout.tensor_parallel_size=4", "model.ffn_hidden_size=90"),
        "but model.ffn_hidden_size is 90; allowed: 1, 2 (nearest: 2).",
    ),
    (
        ("layout.tensor_parallel_size=4", "model.vocab_padding_multiple=2"),
        "but model.vocab_padding_multiple is 2; allowed: 1, 2 (nearest: 2).",
    ),
    (
        (
            "layout.tensor_parallel_size=3",
            "model.num_attention_heads=6",
            "model.head_dim=8",
            "model.ffn_hidden_size=96",
            "model.vocab_padding_multiple=96",
        ),
        "but training.sequence_length is 128, not a multiple of lcm(16, 2 * 3); allowed: 1, 2 (nearest: 2).",
    ),
    (
        ("layout.pipeline_parallel_size=3",),
        "layout.pipeline_parallel_size is 3, but model.num_layers is 2; allowed: 1, 2 (nearest: 2).",
    ),
    (
        ("layout.data_parallel_size=3",),
        "layout.data_parallel_size is 3, but training.global_batch_size is 8; allowed: 1, 2, 4, 8 (nearest: 2).",
    ),
    (
        ("layout.data_parallel_size=2", "training.micro_batch_size=3"),
        "training.micro_batch_size is 3, but each of 2 data-parallel ranks has 4 of training.global_batch_size = 8; "
        "allowed: 1, 2, 4 (nearest: 2).",
    ),
    (("layout.sequence_parallel=true",), "layout.sequence_parallel is true, but layout.tensor_parallel_size is 1"),
    (
        ("layout.virtual_pipeline_parallel_size=2",),
        "layout.virtual_pipeline_parallel_size is 2, but layout.pipeline_parallel_size is 1, so there is no pipeline",
    ),
    (
        ("layout.pipeline_parallel_size=2", "layout.virtual_pipeline_parallel_size=2"),
        "layout.virtual_pipeline_parallel_size is 2, but model.num_layers is 2 on 2 pipeline ranks; allowed: 1",
    ),
    (
        ("model.num_layers=7", "layout.pipeline_parallel_size=3"),
        "but model.num_layers is 7; allowed: 1, 7 (nearest: 1); or layout.pipeline_split=balanced",
    ),
    (
        ("model.num_layers=4", "layout.pipeline_parallel_size=8", "layout.pipeline_split=balanced"),
        "but model.num_layers is 4, and embedding and head count as a layer each; allowed: 1, 2, 3 (nearest: 3)",
    ),
    (
        (*VIRTUAL, "layout.data_parallel_size=8"),
        "each data-parallel rank has 1 micro-batches of training.global_batch_size = 8, and an interleaved pipeline "
        "needs a multiple of layout.pipeline_parallel_size = 2",
    ),
    (
        ("layout.context_parallel_size=3",),
        "layout.context_parallel_size is 3, but training.sequence_length is 128, not a multiple of lcm(16, 2 * 3 * "
        "layout.tensor_parallel_size = 1), because each rank takes two equal pieces of a row; allowed: 1, 2, 4, 8, 16, "
        "32, 64 (nearest: 2).",
    ),
    (("layout.expert_parallel_size=2",), "but model.num_experts is 0, a dense network; allowed: 1."),
    ((*EXPERTS, "layout.expert_parallel_size=3"), "* data_parallel_size is 1; allowed: 1."),
    (
        (*EXPERTS, "layout.data_parallel_size=8", "layout.expert_parallel_size=8"),
        "layout.expert_parallel_size is 8, but model.num_experts is 6; allowed: 1, 2 (nearest: 2).",
    ),
    (
        (*EXPERTS, "layout.data_parallel_size=4", "layout.expert_tensor_parallel_size=4"),
        "layout.expert_tensor_parallel_size is 4, but model.expert_ffn_hidden_size is 90; allowed: 1, 2 (nearest: 2).",
    ),
    ((*EXPERTS, "layout.tensor_parallel_size=2"), "layout.sequence_parallel is false, but layout.tensor_parallel_size"),
    ((*EXPERTS, "device.layers=te"), "device.layers is 'te', but model.num_experts is above 0"),
    ((*EXPERTS, "model.router_topk=7"), "model.router_topk is 7, but model.num_experts is 6; allowed: 1 to 6"),
    ((*EXPERTS, "model.num_dense_layers=2"), "model.num_dense_layers is 2, but model.num_layers is 2"),
    (
        (*EXPERTS, "model.router_choice=experts", "objective.name=autoregressive"),
        "model.router_choice is 'experts', but objective.name is autoregressive: experts that choose among all tokens",
    ),
    (
        (*EXPERTS, "model.router_choice=experts", "objective.name=block"),
        "which it may not see; allowed: tokens; or objective.name masked, uniform or mixed",
    ),
    (("model.rotary_fraction=0.3",), "model.rotary_fraction is 0.3, but a head has 16 channels"),
    (("training.sequence_length=100",), "allowed: a multiple of 16; the nearest are 96 or 112."),
    (("training.sequence_length=10",), "allowed: a multiple of 16; the nearest are 16."),
    (
        ("training.sequence_length=100", "layout.tensor_parallel_size=4"),
        "100, which is not a multiple of 16 = lcm(16, 2 * layout.tensor_parallel_size)",
    ),
    (("data.corpora.second=x",), "data.corpora is {'main': 'corpora/main', 'second': 'x'}, which has 2 entries"),
    (
        ("model.num_query_groups=3",),
        "model.num_query_groups is 3, but model.num_attention_heads is 4; allowed: 1, 2, 4.",
    ),
    (("model.num_attention_heads=5",), "model.num_attention_heads is 5, but model.hidden_size is 64"),
    (("model.hidden_size=12",), "rotary positions need pairs; allowed: a multiple of 8"),
    (("model.head_dim=7",), "model.head_dim is 7, but rotary positions need pairs"),
    (("evaluation.draws=4194304",), "more than the noise law numbers; allowed: at most 4194303"),
    (("training.stop_after_step=21",), "training.stop_after_step is 21, but training.steps is 20; allowed: 1 to 20"),
    (
        ("optimizer.min_learning_rate=1e-2",),
        "optimizer.min_learning_rate is 0.01, but optimizer.learning_rate is 0.003",
    ),
    (("optimizer.min_learning_rate=1e-4",), "optimizer.decay_steps is 0, so that the rate never falls"),
    (("preview.every_steps=2", "preview.prompts=[]"), "preview.prompts is [], so there is nothing to continue"),
    (
        ("preview.every_steps=2", "preview.num_tokens=129"),
        "preview.num_tokens is 129, but a row has training.sequence_length = 128 tokens",
    ),
    (
        ("preview.every_steps=2", "preview.num_tokens=8", "preview.denoising_steps=9"),
        "but each step writes a token at least, and preview.num_tokens is 8; allowed: 1 to 8, or null",
    ),
    (
        ("checkpoint.keep_best=1",),
        "checkpoint.keep_best is 1, but evaluation.every_steps is null, so that no checkpoint's bound is measured; "
        "allowed: 0, or any number with evaluation.every_steps set.",
    ),
    (
        ("checkpoint.keep_best=2", "checkpoint.every_steps=7", "evaluation.every_steps=3"),
        "checkpoint.keep_best is 2, but no step up to training.steps is a multiple of both checkpoint.every_steps = 7 "
        "and evaluation.every_steps = 3, and the last one is not measured; allowed: 0, or any number with a checkpoint "
        "at an evaluated step.",
    ),
    *[
        (
            (f"run.output_dir=runs what{letter}",),
            f"run.output_dir is 'runs what{letter}', and MLflow's database is created in it, whose address cannot "
            f"contain '{letter}'; allowed: a path without '?', '#' and '%'; or any path with tracking.mlflow.uri set "
            "or tracking.mlflow.enabled=false.",
        )
        for letter in "?#%"
    ],
]


@pytest.mark.promise("a value that does not fit is refused, with the allowed values and where to change them")
@pytest.mark.promise("keep_best without an evaluated checkpoint is refused")
@pytest.mark.parametrize(("overrides", "message"), REFUSED, ids=[" ".join(overrides) for overrides, _ in REFUSED])
def test_config_that_does_not_fit_is_refused_with_what_is_allowed(train, refusal, overrides, message):
    error = refused(train, refusal, *overrides)
    assert message in error.message
    assert error.message.endswith("Nothing was started.")


@pytest.mark.promise("a value that does not fit is refused, with the allowed values and where to change them")
def test_refusal_says_where_to_change_the_key(train, refusal, tmp_path):
    error = refused(train, refusal, "layout.pipeline_parallel_size=3")
    assert error.hint == "change layout.pipeline_parallel_size on the command line"
    write_configs(
        tmp_path, model="model:\n  num_layers: 2\n  hidden_size: 64\n  num_attention_heads: 5\n  ffn_hidden_size: 128\n"
    )
    assert refused(train, refusal).hint == "change model.num_attention_heads in model.yaml:4"
    write_configs(tmp_path)
    assert refused(train, refusal, "data.corpora.b=x").hint == "change data.corpora in run.yaml:7"
    assert refusal(validate_train, train("data.corpora.b=x").config).hint is None


def test_default_that_does_not_fit_is_called_a_default(train, refusal):
    error = refused(train, refusal, "training.sequence_length=96", "model.num_attention_heads=1", "model.hidden_size=5")
    assert "model.hidden_size is 5" in error.message
    wider = "training.global_batch_size=3", "layout.tensor_parallel_size=3", "model.num_attention_heads=6"
    error = refused(train, refusal, *wider, "model.head_dim=8", "model.ffn_hidden_size=96")
    assert "model.vocab_padding_multiple is 128" in error.message


@given(
    heads=st.integers(1, 12),
    ffn=st.integers(1, 256),
    padding=st.integers(1, 128),
    length=st.integers(1, 64).map(lambda k: 16 * k),
)
def test_allowed_tensor_parallel_sizes_are_exactly_those_that_are_accepted(train, refusal, heads, ffn, padding, length):
    overrides = [
        f"model.num_attention_heads={heads}",
        "model.head_dim=8",
        f"model.ffn_hidden_size={ffn}",
        f"model.vocab_padding_multiple={padding}",
        f"training.sequence_length={length}",
    ]
    config = train(*overrides).config
    allowed = allowed_tensor_parallel_sizes(shared_numbers(config))
    assert allowed[0] == 1
    for size in range(1, heads + 2):
        # composed once: the files would be read a dozen times an example
        sized = replace(config, layout=replace(config.layout, tensor_parallel_size=size))
        if size in allowed:
            validate_train(sized)
        else:
            assert "layout.tensor_parallel_size" in refusal(validate_train, sized).message


def test_length_unit_is_the_shape_law():
    assert [length_unit(size) for size in (1, 2, 3, 8, 16)] == [16, 16, 48, 16, 32]
    assert all(length_unit(size) == math.lcm(16, 2 * size) for size in range(1, 100))


def test_query_groups_default_to_one_a_head(train):
    assert train().config.model.effective_query_groups == 4
    assert train("model.num_query_groups=2").config.model.effective_query_groups == 2


@pytest.mark.promise("a ramp is accepted exactly when every level fits the layout")
@given(
    start=st.integers(1, 24),
    increment=st.integers(1, 12),
    count=st.integers(1, 5),
    replicas=st.integers(1, 6),
    micro=st.integers(1, 6),
)
def test_ramp_is_accepted_exactly_when_every_level_fits_the_layout(
    train, refusal, start, increment, count, replicas, micro
):
    levels = [start + number * increment for number in range(count + 1)]
    loaded = train(
        f"training.global_batch_size={levels[-1]}",
        f"training.batch_size_ramp_start={start}",
        f"training.batch_size_ramp_increment={increment}",
        "training.batch_size_ramp_samples=50",
        f"layout.data_parallel_size={replicas}",
        f"training.micro_batch_size={micro}",
    )
    misfits = [size for size in levels if size % (replicas * micro) != 0]
    if not misfits:
        validate_train(loaded.config)
        return
    message = refusal(validate_train, loaded.config).message
    assert any(
        f"level of {size} samples" in message or f"global_batch_size is {size}" in message for size in misfits
    ) or (f"global_batch_size = {levels[-1]}" in message)


def test_every_problem_is_found_and_a_broken_ramp_breaks_no_other_rule(train):
    broken = ("training.batch_size_ramp_start=9", *RAMP[1:], "model.head_dim=7", "layout.pipeline_parallel_size=3")
    assert [problem.key for problem in all_problems(train(*broken).config)] == [
        "model.head_dim",
        "training.batch_size_ramp_start",
        "layout.pipeline_parallel_size",
    ]


@pytest.mark.parametrize("other", ["tracking.mlflow.enabled=false", "tracking.mlflow.uri=http://localhost:5000"])
def test_any_output_dir_is_accepted_where_mlflows_database_is_elsewhere(train, other):
    loaded = train("run.output_dir=runs what?", other)
    validate_train(loaded.config, loaded.origins)


@pytest.mark.parametrize("name", ["", "  "])
def test_empty_name_of_an_experiment_is_refused(train, name):
    with pytest.raises(UsageError, match=r"tracking\.mlflow\.experiment .*at least one visible character"):
        train(f"tracking.mlflow.experiment={name}")
