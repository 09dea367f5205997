#!/usr/bin/env bash
# setup.sh FOLDER: the Python environment of a GPU machine, without its GPU, in FOLDER/venv: 5 GB, about 5 minutes.
#
#   PYTHON          a Python 3.12 (default: python3.12)
#   TE_TORCH_WHEEL  a wheel of transformer-engine-torch 2.20.2 that was built against torch 2.11; without one it is
#                   built here (no CUDA compiler is needed, 10 minutes on 2 cores)
set -euo pipefail
[ $# -eq 1 ] || { sed -n '2,6p' "$0"; exit 2; }
mkdir -p "$1"
cd "$1"
[ -d venv ] || "${PYTHON:-python3.12}" -m venv venv
install() { venv/bin/pip install --quiet --no-cache-dir "$@"; }
install wheel setuptools==81.0.0 packaging numpy einops psutil torch==2.11.0
install --no-deps transformer-engine==2.20.2 transformer-engine-cu13==2.20.2 megatron-core==0.16.1 \
  pydantic==2.14.3 pydantic-core==2.50.4 annotated-types==0.8.0 typing-inspection==0.4.5 typing-extensions==4.16.0 \
  importlib-metadata==8.7.1 zipp nvdlfw-inspect==0.2.2 pyyaml
NVTE_PYTORCH_FORCE_BUILD=TRUE install --no-deps --no-build-isolation \
  "${TE_TORCH_WHEEL:-transformer-engine-torch==2.20.2}"
install triton==3.6.0 onnx onnxscript # the library's import needs them
install pytest pytest-timeout hypothesis tokenizers tiktoken pyarrow crc32c rich omegaconf safetensors
NVTE_FRAMEWORK=pytorch venv/bin/python -c \
  'import torch, transformer_engine.pytorch, megatron.core as m; print(torch.__version__, m.__version__)'
