"""Data and models of the layout matrix, with the reference results of transformers and a loop.

The reference shares nothing with the actor: transformers computes the log-probs one response at a time, the loop of
tests/algorithm/reference.py the gradient of the loss with respect to them, autograd the rest, torch the
optimizer steps.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fipo_megatron.algorithm.policy_loss_config import PolicyLossConfig
from fipo_megatron.config import AlgorithmConfig
from fipo_megatron.data.trajectory import Prompt, Trajectory
from tests.algorithm import reference

VOCAB = 150
# A long half-life and unclipped weights, so that what crosses a shard boundary shows; a low bound, so that drops occur.
ALGORITHM = AlgorithmConfig(half_life=64.0, weight_clip=None, dual_clip=3.0, safety_threshold=2.0)
LENGTHS = [(5, 90), (17, 33), (2, 61), (9, 1), (30, 70), (1, 24), (12, 48), (3, 7)]  # prompt, response
DROPPED = 4

# The gradient of a key bias is 0 but for rounding, which Adam would scale up to steps of full size: hence its epsilon.
# SGD has no decay and a rate at which the steps are large beside the rounding of the weights.
OPTIMIZERS = {
    "adam": {"lr": 1e-3, "warmup_steps": 0, "weight_decay": 0.1, "adam_eps": 1e-6},
    "sgd": {"lr": 1.0, "warmup_steps": 0, "weight_decay": 0.0},
}
STEPS = {"adam": 3, "sgd": 1}

_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.06,
    "attn_implementation": "sdpa",
    "experts_implementation": "eager",  # the default has no float64
}
_MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True}
_LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_YARN = {"rope_type": "yarn", "factor": 4.0}
_OLD = {"original_max_position_embeddings": 32, "rope_theta": 10000.0}

ARCHITECTURES = {
    "qwen2": ("Qwen2", {"tie_word_embeddings": False}),
    "qwen2-tied-yarn": ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": _YARN | _OLD}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}),
    "llama3": ("Llama", {"tie_word_embeddings": False, "rope_parameters": _LLAMA3 | _OLD}),
    "qwen3-moe": ("Qwen3Moe", {"tie_word_embeddings": False, **_MIXTURE}),
}

# Architectures with fields of TransformerConfig after the comma. The losses make up most of a router's gradient.
TRANSFORMER = {"qwen3-moe, router losses": {"moe_aux_loss_coeff": 0.2, "moe_z_loss_coeff": 0.05}}


def build_transformers_model(name: str) -> torch.nn.Module:
    """Returns a tiny random model in float32, the same on every rank, with non-trivial norms and biases."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    family, changes = ARCHITECTURES[name.partition(",")[0]]
    config = getattr(transformers, f"{family}Config")(**(_SMALL | changes))
    torch.manual_seed(11)
    model = getattr(transformers, f"{family}ForCausalLM")(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@dataclass
class Expected:
    """Results that a layout must reproduce.

    Attributes:
        log_probs: Log-probs of the tokens of each response, ``[R]`` float64.
        trajectories: The responses, with the *old* log-probs of the loss as ``behaviour_log_probs``.
        loss: Loss of the mini-batch.
        denominator: Number of tokens in the loss.
        gradients: Gradients by transformers name.
        grad_norm: Norm of the gradient before clipping.
    """

    log_probs: list[Tensor]
    trajectories: list[Trajectory]
    loss: float = 0.0
    denominator: int = 0
    gradients: dict[str, Tensor] = field(default_factory=dict)
    grad_norm: float = 0.0


def make_expected(model: torch.nn.Module, losses: Mapping[str, float] = MappingProxyType({})) -> Expected:
    """Draws responses, and old log-probs near the model's; computes loss and gradient of the first step in float64.

    ``losses`` has the coefficients of the routers' auxiliary losses.
    """
    model = copy.deepcopy(model).double()
    rng = np.random.default_rng(5)
    texts = [(rng.integers(0, VOCAB, p), rng.integers(0, VOCAB, r)) for p, r in LENGTHS]
    with torch.no_grad():
        log_probs = [response_log_probs(model, prompt, response) for prompt, response in texts]
    trajectories = []
    for number, ((prompt, response), current) in enumerate(zip(texts, log_probs, strict=True)):
        shift = rng.normal(0.02, 0.1, len(response))
        if number == DROPPED:
            shift[[10, 40]] = 1.5  # above ln 3
        old = np.minimum(current.numpy() - shift, 0.0).astype(np.float32)
        advantage = -0.8 if number == DROPPED else float(np.float32(rng.normal()))
        mask = rng.random(len(response)) < 0.95
        mask[0] = True
        trajectories.append(Trajectory(Prompt(f"p{number}", prompt, ""), 0, response, old, mask, advantage=advantage))
    expected = Expected(log_probs, trajectories)
    expected.loss, expected.denominator = backward(model, trajectories, losses=losses)
    expected.gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    expected.grad_norm = float(
        torch.stack([g.double().square().sum() for g in expected.gradients.values()]).sum().sqrt()
    )
    return expected


def response_log_probs(model: torch.nn.Module, prompt: np.ndarray, response: np.ndarray) -> Tensor:
    """Returns log π of each response token, ``[R]``, from one unpadded sequence, in the dtype of the model."""
    tokens = torch.from_numpy(np.concatenate([prompt, response])).long()
    logits = model(tokens[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, tokens[len(prompt) :, None])[:, 0]


def backward(
    model: torch.nn.Module,
    trajectories: list[Trajectory],
    config: PolicyLossConfig = ALGORITHM,
    losses: Mapping[str, float] = MappingProxyType({}),
) -> tuple[float, int]:
    """Sets the gradients of the mini-batch loss; returns the loss, without auxiliary losses, and its denominator."""
    model.zero_grad()
    with router_logits(model) as routers:
        log_probs = [response_log_probs(model, t.prompt.tokens, t.tokens) for t in trajectories]
    responses = [
        reference.Response(
            current.detach().double().numpy(),
            t.behaviour_log_probs.astype(np.float64),
            np.full(len(t.tokens), t.advantage),
            t.mask,
        )
        for current, t in zip(log_probs, trajectories, strict=True)
    ]
    loss, gradients, denominator, _ = reference.mini_batch(responses, config)
    upstream = [torch.from_numpy(gradient) for gradient in gradients]
    total = sum((current * g).sum() for current, g in zip(log_probs, upstream, strict=True))
    if losses:
        total = total + auxiliary_losses(model, [torch.cat(logits) for logits in routers], losses) / denominator
    total.backward()
    return float(loss), denominator


@contextmanager
def router_logits(model: torch.nn.Module) -> Iterator[list[list[Tensor]]]:
    """Records the logits ``[tokens, experts]`` of every forward pass in the block, by layer."""
    routers = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    found: list[list[Tensor]] = [[] for _ in routers]
    hooks = [
        router.register_forward_pre_hook(
            lambda module, inputs, logits=logits: logits.append(inputs[0].flatten(0, -2) @ module.weight.T)
        )
        for router, logits in zip(routers, found, strict=True)
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def auxiliary_losses(model: torch.nn.Module, routers: list[Tensor], losses: Mapping[str, float]) -> Tensor:
    """Returns the sum over routers and tokens of the load-balancing loss and the z-loss, with loads of all tokens."""
    experts, top_k = model.config.num_experts, model.config.num_experts_per_tok
    total = torch.zeros((), dtype=torch.float64)
    for logits in routers:
        chosen = logits.topk(top_k).indices
        loads = torch.tensor([float((chosen == expert).sum()) for expert in range(experts)]) / chosen.numel()
        balance = experts * (loads.double() * logits.softmax(-1)).sum()
        total = total + losses["moe_aux_loss_coeff"] * balance
        total = total + losses["moe_z_loss_coeff"] * logits.exp().sum(-1).log().square().sum()
    return total


def optimizer_steps(name: str, trajectories: list[Trajectory], kind: str) -> dict[str, Tensor]:
    """Returns the weights after plain torch steps from the start: gradients clipped at 1, decay on matrices only."""
    model, settings = build_transformers_model(name).double(), OPTIMIZERS[kind]
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    decay = settings["weight_decay"]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=settings["lr"])
    if kind == "adam":
        optimizer = torch.optim.AdamW(groups, lr=settings["lr"], betas=(0.9, 0.999), eps=settings["adam_eps"])
    for _ in range(STEPS[kind]):
        backward(model, trajectories, losses=TRANSFORMER.get(name, {}))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return {key: value.clone() for key, value in model.state_dict().items()}


@dataclass
class Reference:
    """A model with the results that every layout must reproduce.

    Attributes:
        config: Its Hugging Face configuration, with ``architectures``.
        start: Weights by transformers name, float32.
        expected: Log-probs, loss and gradients of the first step.
        updated: Weights after the steps of each optimizer, by transformers name.
    """

    config: dict[str, Any]
    start: dict[str, Tensor]
    expected: Expected
    updated: dict[str, dict[str, Tensor]]


DIRECTORY = "FIPO_TEST_REFERENCES"
"""Environment variable with the directory of :func:`write_references`."""


@cache
def reference_of(name: str) -> Reference:
    """Returns the reference of an architecture from the directory that the environment names, else computes it."""
    if directory := os.environ.get(DIRECTORY):
        found: Reference = torch.load(Path(directory) / f"{name}.pt", weights_only=False)
        return found
    model = build_transformers_model(name)
    expected = make_expected(model, TRANSFORMER.get(name, {}))
    return Reference(
        config=model.config.to_dict() | {"architectures": [type(model).__name__]},
        start=model.state_dict(),
        expected=expected,
        updated={kind: optimizer_steps(name, expected.trajectories, kind) for kind in OPTIMIZERS},
    )


def write_references(directory: Path) -> None:
    """Computes the references of all architectures once, for jobs of several ranks."""
    for name in (*ARCHITECTURES, *TRANSFORMER):
        torch.save(reference_of(name), directory / f"{name}.pt")
