"""FP8 settings that do not fit are refused, and a set key without an effect is an error."""

from __future__ import annotations

import pytest

from megamask.config.validate import validate_train

EMULATE = "precision.fp8_kernels=emulate"
BF16 = "precision.compute=bf16"


def fp8(recipe, *others):
    return (f"precision.fp8={recipe}", *others)


ACCEPTED = [
    fp8("tensorwise", EMULATE),
    fp8("tensorwise", EMULATE, BF16, "precision.fp8_first_layers_bf16=1"),
    fp8("delayed", EMULATE, "precision.fp8_amax_history=4", "precision.fp8_margin=1"),
    fp8("blockwise", EMULATE, "device.layers=local", "training.recompute=full"),
    fp8("delayed", BF16),
    fp8("tensorwise", BF16, "device.layers=te", "device.attention=te", "training.recompute=selective"),
    ("device.attention=te", "layout.context_parallel_size=2"),
    ("device.attention=te", "data.isolate_documents=true"),
    fp8("mxfp8", BF16, "layout.tensor_parallel_size=2"),
]
REFUSED = [
    ((EMULATE,), "precision.fp8_kernels is 'emulate', but precision.fp8 is none, which does not use it; allowed: te"),
    (("precision.fp8_last_layers_bf16=1",), "precision.fp8_last_layers_bf16 is 1, but precision.fp8 is none"),
    (fp8("delayed", EMULATE, "precision.fp8_first_layers_bf16=1"), "is 1, but precision.fp8 is delayed"),
    (
        fp8("tensorwise", EMULATE, "precision.fp8_amax_history=9"),
        "precision.fp8_amax_history is 9, but precision.fp8 is",
    ),
    (fp8("blockwise", EMULATE, "precision.fp8_margin=1"), "precision.fp8_margin is 1, but precision.fp8 is blockwise"),
    (fp8("mxfp8", EMULATE), "which megamask does not emulate; allowed: tensorwise, delayed, blockwise"),
    (fp8("tensorwise"), "precision.compute is 'fp32', but Transformer Engine's FP8 layers work on bf16"),
    (
        fp8("tensorwise", EMULATE, "precision.fp8_first_layers_bf16=1", "precision.fp8_last_layers_bf16=1"),
        "but the model has 2 layers, so that none of them would compute in FP8; allowed: together with the other end "
        "at most 1",
    ),
    (
        fp8("delayed", EMULATE, "training.recompute=full"),
        "training.recompute is 'full', but precision.fp8=delayed counts",
    ),
    (fp8("tensorwise", BF16, "model.hidden_size=60", "model.head_dim=16"), "products of 60 features; the kernels of"),
    (fp8("blockwise", BF16), "products of 64 features; the kernels of precision.fp8=blockwise take multiples of 128"),
    (fp8("tensorwise", EMULATE, "device.layers=te"), "device.layers is 'te', but precision.fp8_kernels is emulate"),
    (fp8("tensorwise", BF16, "device.layers=local"), "device.layers is 'local', but precision.fp8_kernels is te"),
    (("device.layers=local", "device.attention=te"), "device.attention is 'te', but device.layers is local"),
    (
        ("device.layers=local", "device.weight_gradients=fused"),
        "but the layers are not Transformer Engine's, the only ones that have a choice",
    ),
    (("device.overlap_parameter_gather=true",), "but device.overlap_gradient_reduce is false, so that all weights are"),
    (("device.overlap_gradient_reduce=true",), "context_parallel_size are 1, so that there is nothing to sum"),
    (("device.attention=te", "objective.name=block"), "device.attention is 'te', but objective.name is block"),
    (
        ("device.grouped_queries=shared", "model.num_query_groups=4"),
        "device.grouped_queries is 'shared', but each query head has keys and values of its own",
    ),
    *(
        (
            ("device.cuda_graphs=true", *(() if key == "precision.compute" else (BF16,)), *settings),
            f"device.cuda_graphs is true, which {key} rules out",
        )
        for key, *settings in (
            ("precision.compute",),
            ("device.layers", "device.layers=local"),
            ("device.layers", "precision.fp8=tensorwise", EMULATE),
            ("precision.fp8", "precision.fp8=delayed"),
            ("training.recompute", "training.recompute=full"),
            ("layout.pipeline_parallel_size", "layout.pipeline_parallel_size=2"),
            ("layout.tensor_parallel_size", "layout.tensor_parallel_size=2"),
            ("objective.complementary_until_tokens", "objective.complementary_until_tokens=100"),
            ("data.isolate_documents", "data.isolate_documents=true", "device.attention=te"),
            (
                "device.overlap_gradient_reduce",
                *("device.overlap_gradient_reduce=true", "layout.data_parallel_size=2"),
            ),
        )
    ),
    (
        ("device.attention=te", "layout.context_parallel_size=2", "objective.random_length_fraction=0.01"),
        "its ring takes undivided rows only: objective.random_length_fraction is above 0",
    ),
]


@pytest.mark.promise("FP8 settings that fit are accepted; those that do not, or do nothing, are refused by name")
@pytest.mark.parametrize("overrides", ACCEPTED, ids=" ".join)
def test_fp8_settings_that_fit_are_accepted(train, overrides):
    loaded = train(*overrides)
    validate_train(loaded.config, loaded.origins)


@pytest.mark.promise("FP8 settings that fit are accepted; those that do not, or do nothing, are refused by name")
@pytest.mark.parametrize(
    ("overrides", "message"), REFUSED, ids=lambda value: " ".join(value) if isinstance(value, tuple) else ""
)
def test_fp8_settings_that_do_not_fit_are_refused(train, refusal, overrides, message):
    loaded = train(*overrides)
    error = refusal(validate_train, loaded.config, loaded.origins)
    assert message in error.message
    assert error.message.endswith("Nothing was started.")
