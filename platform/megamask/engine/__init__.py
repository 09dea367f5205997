"""The only room that knows megatron-core; importing it readies torch, which megatron-core inspects at import."""

from megamask.engine.backend import prepare_torch

prepare_torch()
