"""An actor on the GPU with the weights of a transformers model, by either set of layers, and what to compare it with.

Every width is a multiple of 128, so that each FP8 recipe takes all the matrix products.
"""

from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist

from fipo_megatron.actor import parallel
from fipo_megatron.actor.actor import MegatronActor
from fipo_megatron.actor.log_probs import TokenLogProbs
from fipo_megatron.actor.micro_batches import local_micro_batches
from fipo_megatron.config import ActorConfig, Config, OptimizerConfig, ParallelConfig
from fipo_megatron.config.padding import token_multiple
from fipo_megatron.data.context_parallel import CpLayout
from fipo_megatron.data.packing import pack, plan_micro_batches
from fipo_megatron.weights.architecture import Architecture
from tests.actor import hf_reference
from tests.distributed import layout_cases

SHAPE = {
    "vocab_size": layout_cases.VOCAB,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.06,
    "attn_implementation": "eager",
}
FAMILIES = {"qwen2": ("Qwen2", {}), "qwen3": ("Qwen3", {"tie_word_embeddings": True}), "llama": ("Llama", {})}
TORCH_LAYERS = {"transformer_impl": "local"}
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""Transformer Engine's names of the norms before a matrix, and the names that they have otherwise."""


@dataclass
class Reference:
    """A transformers model in float32 on the CPU, and what it makes of the responses of layout_cases."""

    architecture: Architecture
    state: dict[str, torch.Tensor]
    expected: layout_cases.Expected


def transformers_model(name):
    """A model with random weights, in float32 on the CPU."""
    import transformers

    family, changes = FAMILIES[name]
    config = getattr(transformers, f"{family}Config")(**(SHAPE | changes))
    return getattr(transformers, f"{family}ForCausalLM")(config).float()


@cache
def reference_of(name):
    torch.manual_seed(11)
    model = transformers_model(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    architecture = Architecture.from_hf(model.config.to_dict() | {"architectures": [type(model).__name__]})
    return Reference(architecture, model.state_dict(), layout_cases.make_expected(model))


def unfused(name):
    """A parameter's name among layers whose norms stand alone."""
    for fused, plain in FUSED_NORMS.items():
        if name.endswith(fused):
            return name.removesuffix(fused) + plain
    return name


_layout = None


def one_rank():
    """The layout of one rank; its process groups, which take seconds on a GPU, stay until the process ends."""
    global _layout
    if _layout is None or not dist.is_initialized():
        _layout = parallel.initialize(ParallelConfig(), seed=3, environment={})
    return _layout


class Case:
    """An actor, alone on its GPU, with everything in one mini-batch of several packed micro-batches.

    Args:
        name: See ``FAMILIES``.
        changes: To the actor's settings: float32, the layers of torch, no distributed optimizer, Adam at lr 1e-4.
    """

    def __init__(self, name, **changes):
        self.reference = reference_of(name)
        self.trajectories = self.reference.expected.trajectories
        settings = {
            "dtype": "float32",
            "transformer": TORCH_LAYERS,
            "distributed_optimizer": False,
            "vocab_multiple": 128,
            "log_prob_chunk_tokens": 50,
            "optimizer": OptimizerConfig(lr=1e-4, warmup_steps=0),
        }
        actor = ActorConfig(**(settings | changes))
        self.layout = one_rank()
        config = Config(actor=actor, algorithm=layout_cases.ALGORITHM)
        self.actor = MegatronActor(config, self.reference.architecture, self.layout, self.load)
        self.multiple = token_multiple(actor)
        padded = [CpLayout().padded_length(len(t)) for t in self.trajectories]
        self.plan = plan_micro_batches(padded, [range(len(padded))], token_budget=max(128, *padded))
        (self.members,) = self.plan[0].micro_batches

    def load(self, chunks):
        for chunk in chunks:
            full = hf_reference.full_tensors(self.reference.state, self.reference.architecture, chunk.vocab_size)
            with torch.no_grad():
                for name, parameter in chunk.named_parameters():
                    parameter.copy_(full[unfused(name)])

    def log_probs(self):
        return self.actor.log_probs(self.plan, self.trajectories)

    def old_log_probs(self):
        """Those of the reference's loss, which travel as behaviour log-probs."""
        micros = local_micro_batches(self.members, self.trajectories, self.layout, token_multiple=self.multiple)
        return [[TokenLogProbs(micro.behaviour_log_probs, None) for micro in micros]]

    def of_responses(self, stored):
        """``[R]`` of every response, on the CPU, in the order of the trajectories."""
        found = {}
        for members, part in zip(self.members, stored[0], strict=True):
            packed = pack([self.trajectories[i] for i in members], CpLayout(), multiple_of=self.multiple)
            for start, i in zip(packed.cu_seqlens[:-1], members, strict=True):
                first = int(start) + len(self.trajectories[i].prompt.tokens) - 1
                found[i] = part.log_probs[first : first + len(self.trajectories[i].tokens)].cpu()
        return [found[i] for i in range(len(self.trajectories))]

    def response_log_probs(self):
        return torch.cat(self.of_responses(self.log_probs()))

    def gradients(self, old):
        """Returns the loss's gradients on the CPU, under the names of layers whose norms stand alone."""
        self.actor.forward_backward(self.plan[0], self.trajectories, old[0])
        (chunk,) = self.actor.chunks
        found = {unfused(name): p.main_grad.detach().double().cpu() for name, p in chunk.named_parameters()}
        self.actor.zero_grad()
        return found

    def noise_floor(self):
        return self.actor.noise_floor(self.plan[0], self.trajectories, self.log_probs())

    def update(self, old):
        (metrics,) = self.actor.update(self.plan, self.trajectories, old)
        return metrics


def distance(found, expected):
    """Relative L2 distance of the worst tensor, and of all together."""
    errors = {name: float((found[name] - want.double()).square().sum()) for name, want in expected.items()}
    sizes = {name: float(want.double().square().sum()) for name, want in expected.items()}
    worst = max((errors[name] / sizes[name]) ** 0.5 for name in errors)
    return worst, (sum(errors.values()) / sum(sizes.values())) ** 0.5
