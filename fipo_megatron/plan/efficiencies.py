"""Efficiencies: what fraction of a device's peak rates the parts of a step reach, each with its source.

This is the only place with numbers that do not follow from the configuration, the model or a data sheet. An entry is

- ``measured`` on a GPU by this project (``benchmarks/results``),
- ``published`` by others and converted to the unit here, or
- ``assumed``, because no figure was found.

An estimate is as good as the weakest entry that it rests on, and says which kind that is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Kind = Literal["measured", "published", "assumed"]
_KINDS: tuple[Kind, ...] = ("measured", "published", "assumed")


@dataclass(frozen=True)
class Efficiency:
    """One entry.

    Attributes:
        value: The number.
        unit: Its unit.
        kind: Origin of the value: measured, published or assumed.
        source: File, page or reason.
    """

    value: float
    unit: str
    kind: Kind
    source: str


_H200 = "benchmarks/results/gpu_nvidia_h200_te.json"
_H200_TORCH = "benchmarks/results/gpu_nvidia_h200_torch.json"
_FIT = f"{_H200}: four micro-batches, each with its log-prob pass and training step, reproduced within 5 %"
_H100 = "benchmarks/results/gpu_nvidia_h100_80gb_hbm3_te.json"
_FP8 = f"{_H100}: Qwen2.5-7B with 4 layers, quantisation included"
_FP8_LAUNCH = f"{_H100}: log-probs of Qwen3-0.6B, 16,384 packed, without the output layer; by the host of that machine"
_HEAD = f"{_H100}: output layer of 32,768 × 5,120 × 19,008, with that of gpu_nvidia_h200_te.json"
_FIT_TORCH = f"{_H200_TORCH}: four micro-batches, each with its log-prob pass and training step, within 12 %"
_QWEN_72B = (
    "https://github.com/tenstorrent/tt-inference-server/issues/143: Qwen2.5-72B on 2 H100, 30.9 ms per token at one "
    "request, of which the weights at this fraction take 25.5 ms"
)
_GPUSTACK_14B = (
    "https://github.com/gpustack/gpustack/blob/47277d79f4a5bae12a2d25e9ecbed2a2177a5f2d/docs/performance-lab/qwen3-14b/"
    "h100.md: Qwen3-14B on one H100, SGLang 0.5.5, peak of 12,059 tokens/s with a full KV cache; `decode_kv` and "
    "`decode_matmul` together reproduce it within 15 %"
)
_BRIDGE_30B = (
    "https://github.com/NVIDIA-NeMo/Megatron-Bridge/blob/067f987df03b8355b03192d88d70f1709fedf51a/docs/"
    "performance-summary-archive.md: Qwen3-30B-A3B in FP8 on 16 H100 (EP8, PP2), 9,058 tokens/s per GPU; 8,624 here"
)
_NEMO_RL_OTHER = (
    "https://github.com/NVIDIA-NeMo/RL/pull/1052: 4.0 of 66.6 s are none of sampling, log-probs, training and sync"
)
_SLIME = "https://hebiao064.github.io/rl-weight-sync: 61 GB of Qwen3-30B-A3B in 7 s on 8 H100, in buckets of 512 MiB"

TABLE: Mapping[str, Efficiency] = MappingProxyType(
    {
        # Training, by kind of layers: "te" for Transformer Engine, "torch" for layers of torch.
        "matmul": Efficiency(
            0.78, "of bf16 peak", "measured", f"{_H200}: one product of 8,192 × 5,120 × 19,008, 772 TFLOP/s"
        ),
        "matmul_fp8_blockwise": Efficiency(
            0.59, "of FP8 peak", "measured", f"{_H200}: Qwen2.5-7B with 4 layers, quantisation included"
        ),
        "matmul_fp8_tensorwise": Efficiency(0.68, "of FP8 peak", "measured", _FP8),
        "matmul_fp8_delayed": Efficiency(0.73, "of FP8 peak", "measured", _FP8),
        "attention_forward_te": Efficiency(0.60, "of bf16 peak", "measured", _FIT),
        "attention_backward_te": Efficiency(0.42, "of bf16 peak", "measured", _FIT),
        "elementwise_te": Efficiency(0.45, "of memory bandwidth", "measured", _FIT),
        "attention_forward_torch": Efficiency(0.36, "of bf16 peak", "measured", _FIT_TORCH),
        "attention_backward_torch": Efficiency(0.27, "of bf16 peak", "measured", _FIT_TORCH),
        "elementwise_torch": Efficiency(0.098, "of memory bandwidth", "measured", _FIT_TORCH),
        "logit_bytes_forward": Efficiency(
            37, "bytes per logit", "measured", f"{_HEAD}: 21.6 and 19.5 ms forward; the part that follows the bandwidth"
        ),
        "logit_seconds_forward": Efficiency(
            10.4e-12, "seconds per logit", "measured", f"{_HEAD}: forward; the part that is equal on both"
        ),
        "logit_seconds_backward": Efficiency(
            26.2e-12, "seconds per logit", "measured", f"{_HEAD}: 73.7 and 68.6 ms forward and backward"
        ),
        "optimizer_bytes": Efficiency(
            40, "bytes per parameter", "assumed", "gradient, main parameter and moments read and written in float32"
        ),
        "layer_launch": Efficiency(
            250e-6,
            "seconds per layer and micro-batch",
            "assumed",
            "about 40 kernels of 6 µs; a forward pass of a layer cannot take less",
        ),
        "layer_launch_fp8_blockwise": Efficiency(4.3e-3, "seconds per layer and micro-batch", "measured", _FP8_LAUNCH),
        "layer_launch_fp8_tensorwise": Efficiency(2.7e-3, "seconds per layer and micro-batch", "measured", _FP8_LAUNCH),
        "layer_launch_fp8_delayed": Efficiency(2.7e-3, "seconds per layer and micro-batch", "measured", _FP8_LAUNCH),
        "expert_matmul": Efficiency(0.5, "of a dense product's rate", "published", _BRIDGE_30B),
        # Communication, as a fraction of the links' bandwidth.
        "nvlink": Efficiency(
            0.75, "of NVLink bandwidth", "assumed", "NCCL's rings on large messages reach 330 to 370 of 450 GB/s"
        ),
        "network": Efficiency(0.7, "of network bandwidth", "assumed", "collectives over 400 Gb/s adapters"),
        "pipeline_network": Efficiency(0.5, "of network bandwidth", "assumed", "point to point, one message at a time"),
        "context_exposed": Efficiency(
            0.5, "of the time of the exchange", "assumed", "keys and values travel while attention computes"
        ),
        "gradient_exposed_overlap": Efficiency(
            0.3, "of the time of the reduction", "assumed", "what backward does not hide with overlap_grad_reduce"
        ),
        # Generation.
        "decode_weights": Efficiency(0.85, "of memory bandwidth", "published", _QWEN_72B),
        "decode_kv": Efficiency(0.7, "of memory bandwidth", "published", _GPUSTACK_14B),
        "decode_matmul": Efficiency(0.6, "of bf16 peak", "published", _GPUSTACK_14B),
        "decode_layer": Efficiency(67e-6, "seconds per layer and token", "published", _QWEN_72B),
        "decode_step": Efficiency(1e-3, "seconds per token", "assumed", "sampling, log-probs and the scheduler"),
        "prefill_matmul": Efficiency(0.5, "of bf16 peak", "assumed", "chunked prefill beside decoding"),
        "engine_reserve": Efficiency(
            14,
            "GiB per GPU",
            "published",
            "SGLang 0.5.23, srt/arg_groups/memory_hook.py: 1.5 MiB per token of a prefill chunk of 8,192, 2 MiB per "
            "captured request, and more; if rollout.sglang.mem_fraction_static is not set",
        ),
        "decode_experts": Efficiency(
            0.5, "of memory bandwidth", "assumed", "a few tokens per expert: products of 8 to 16 rows"
        ),
        # Between the phases.
        "other": Efficiency(0.06, "of the step", "published", _NEMO_RL_OTHER),
        "sync_distributed": Efficiency(
            61e9 / 7, "bytes per second", "published", f"{_SLIME}; colocated there, a broadcast here"
        ),
        "sync_tensor": Efficiency(0.5e9, "bytes per second", "assumed", "base64 in the request, through the host"),
        "sync_disk": Efficiency(
            2e9, "bytes per second", "assumed", "a shared file system, written once and then read by the servers"
        ),
        "host_link": Efficiency(0.7, "of the host link's bandwidth", "assumed", "pinned memory over PCIe"),
    }
)
"""The efficiencies by name."""


class Rates:
    """Reads entries of a table and remembers for what, so that an estimate can say what it rests on.

    Args:
        table: The table; :data:`TABLE`, or a copy with entries replaced.
    """

    def __init__(self, table: Mapping[str, Efficiency] = TABLE) -> None:
        self._table = table
        self._used: dict[str, set[str]] = {}

    def peek(self, name: str) -> float:
        """Returns the value of an entry without remembering it."""
        return self._table[name].value

    def read(self, name: str, purpose: str) -> float:
        """Returns the value of an entry that a purpose rests on."""
        self._used.setdefault(purpose, set()).add(name)
        return self._table[name].value

    def basis(self, *purposes: str) -> Kind:
        """Returns the weakest kind among the entries that some purposes rest on; ``measured`` if there are none."""
        return weakest(self._table[name].kind for purpose in purposes for name in self._used.get(purpose, ()))


def weakest(kinds: Iterable[Kind]) -> Kind:
    """Returns the least certain of some kinds; ``measured`` if there are none."""
    return max(kinds, key=_KINDS.index, default="measured")
