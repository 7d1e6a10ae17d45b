"""HF → Megatron and back: anonymous memory of all processes, saving included, and speed compared with a plain copy.

The models are SmolLM2-135M (prepared by ``make test-pretrained``) and a synthetic one of about 2 GB. The bound is the
size of the model, twice the largest tensor and 1 GiB for processes. A plain copy of the same file is timed in the run.

    python -m benchmarks.conversion
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from benchmarks.memory import anonymous
from benchmarks.result_table import print_table, write_result
from fipo_megatron.weights import hf_files, tables
from fipo_megatron.weights.architecture import Architecture

SYNTHETIC = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 1536,
    "num_hidden_layers": 18,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "intermediate_size": 8960,
    "vocab_size": 65_536,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
OVERHEAD = 1 << 30


def write_synthetic(directory: Path) -> None:
    """Writes random bfloat16 weights, tensor by tensor."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(SYNTHETIC))
    wanted = tables.hf_tensors(Architecture.from_directory(directory))
    files = hf_files.plan_files(((name, shape, 0) for name, shape in wanted.items()), torch.bfloat16, 1 << 40)
    generator = torch.Generator().manual_seed(0)
    with hf_files.TensorWriter(directory, files, torch.bfloat16) as writer:
        for name, shape in wanted.items():
            writer.write(name, torch.randn(shape, generator=generator))
        writer.finish()


def descendants(root: int) -> Iterable[int]:
    yield root
    for children in Path(f"/proc/{root}/task").glob("*/children"):
        for child in children.read_text().split():
            yield from descendants(int(child))


def run(command: list[str]) -> tuple[float, int]:
    """Runs a command; returns its seconds and the peak memory of all its processes, sampled every 10 ms."""
    start = time.perf_counter()
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            try:
                peak = max(peak, sum(map(anonymous, descendants(process.pid))))
            except OSError:
                continue  # a process ended during sampling

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    if code:
        raise RuntimeError(f"{command}: exit code {code}")
    return seconds, peak


def copy_and_sync(source: Path, target: Path) -> float:
    """Returns the seconds of a plain copy that is synced to disk, like the converters' files."""
    start = time.perf_counter()
    for file in source.glob("*.safetensors"):
        shutil.copyfile(file, target)
        handle = os.open(target, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    return time.perf_counter() - start


def largest_tensor(directory: Path) -> int:
    largest = 0
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no dict
                largest = max(largest, tensors.get_tensor(name).nbytes)
    return largest


def measure(name: str, model: Path, scratch: Path, ranks: int) -> dict[str, Any]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    start_up, _ = run([sys.executable, "-c", "import fipo_megatron.actor.hf_conversion"])
    copying = copy_and_sync(model, scratch / "copy")
    there, back = scratch / "megatron", scratch / "hf"
    convert = [sys.executable, *launcher, "-m", "fipo_megatron.convert"]
    seconds_there, peak_there = run([*convert, "hf-to-megatron", str(model), str(there)])
    seconds_back, peak_back = run([*convert, "megatron-to-hf", str(there), str(back)])
    result = {
        "model": name,
        "ranks": ranks,
        "bytes": size,
        "largest_tensor_bytes": (largest := largest_tensor(model)),
        "bound_bytes": size + 2 * largest + OVERHEAD,
        "peak_bytes": {"to_megatron": peak_there, "to_hf": peak_back},
        "seconds": {"to_megatron": seconds_there, "to_hf": seconds_back, "copy": copying, "imports": start_up},
    }
    for path in (there, back):
        shutil.rmtree(path)
    (scratch / "copy").unlink()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    from tests.pretrained import smollm2

    pretrained = smollm2.prepare()
    with tempfile.TemporaryDirectory(dir=smollm2.DIRECTORY) as directory:
        scratch = Path(directory)
        write_synthetic(scratch / "synthetic")
        models = {"SmolLM2-135M float32": pretrained, "synthetic bfloat16": scratch / "synthetic"}
        results = [measure(name, path, scratch, ranks) for name, path in models.items() for ranks in (1, 2)]
    rows = []
    for result in results:
        seconds = result["seconds"]
        for way in ("to_megatron", "to_hf"):
            rows.append(
                {
                    "model": result["model"],
                    "ranks": str(result["ranks"]),
                    "MB": f"{result['bytes'] / 1e6:.0f}",
                    "way": way,
                    "peak RssAnon MB": f"{result['peak_bytes'][way] / 1e6:.0f}",
                    "bound MB": f"{result['bound_bytes'] / 1e6:.0f}",
                    "seconds": f"{seconds[way]:.1f}",
                    "of them imports": f"{seconds['imports']:.1f}",
                    "MB/s": f"{result['bytes'] / 1e6 / seconds[way]:.0f}",
                    "copy MB/s": f"{result['bytes'] / 1e6 / seconds['copy']:.0f}",
                }
            )
    print_table("Conversion", rows)
    write_result("conversion", {"results": results})


if __name__ == "__main__":
    main()
