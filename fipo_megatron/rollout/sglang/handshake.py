"""Checks what every SGLang server serves before the first prompt is sent."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fipo_megatron.rollout.engine import EngineError
from fipo_megatron.rollout.sglang.client import SglangClient

TESTED_VERSION = "0.5.23"
_PROBES = ("What is 7 + 5? Answer: 12.", "∫ x² dx = x³/3 + C", "\n\n  Let $\\frac{1}{2}$ be given.\t")


@dataclass(frozen=True)
class ServerFacts:
    """Properties that a server reports.

    Attributes:
        url: URL of the server.
        version: Version of SGLang.
        weight_version: Version of its weights.
        context: Tokens that it accepts for a prompt and its response together.
        dtype: Data type of its weights.
        ranks: Number of ranks, its tensor-parallel size.
    """

    url: str
    version: str
    weight_version: int
    context: int
    dtype: str
    ranks: int


async def handshake(
    client: SglangClient,
    model_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    longest: int,
    version: str | None = TESTED_VERSION,
) -> tuple[ServerFacts, ...]:
    """Compares every server with the model to train.

    Args:
        client: Client of the servers.
        model_path: Directory of the model.
        tokenizer: Tokenizer of the model; the servers must tokenise to the same ids.
        longest: Tokens of the longest prompt with its response.
        version: Version of SGLang that the servers must have; None for any.

    Returns:
        The properties that each server reports.

    Raises:
        EngineError: a server cannot be reached or serves another model; every difference is listed.
    """
    config = json.loads((model_path / "config.json").read_text(encoding="utf-8"))
    models = await client.look_up("/model_info")
    servers = await client.look_up("/server_info")
    problems, found = [], []
    for url in client.pool.workers:
        facts = _facts(url, models[url], servers[url])
        found.append(facts)
        problems += [
            f"{url}: {text}" for text in _differences(facts, models[url], servers[url], config, longest, version)
        ]
    for probe in _PROBES:
        mine = tokenizer(probe, add_special_tokens=False)["input_ids"]
        answers = await client.control("/tokenize", {"prompt": probe, "add_special_tokens": False})
        for url, answer in answers.items():
            if answer.get("tokens") != mine:
                problems.append(
                    f"{url}: tokenises {probe!r} to {answer.get('tokens')}, the model's tokenizer to {mine}"
                )
    if problems:
        raise EngineError(f"{model_path}: not what the SGLang servers serve:\n" + "\n".join(problems))
    return tuple(found)


def _facts(url: str, model: dict[str, Any], server: dict[str, Any]) -> ServerFacts:
    return ServerFacts(
        url,
        str(server.get("version")),
        int(model["weight_version"]),
        int(server["max_req_input_len"]),
        str(server.get("dtype")),
        int(server.get("tp_size", 1)),
    )


def _differences(
    facts: ServerFacts,
    model: dict[str, Any],
    server: dict[str, Any],
    config: dict[str, Any],
    longest: int,
    version: str | None,
) -> list[str]:
    problems = []
    for name in ("architectures", "model_type"):
        if model.get(name) != config.get(name):
            problems.append(f"{name} = {model.get(name)}, config.json has {config.get(name)}")
    if version is not None and facts.version != version:
        problems.append(f"SGLang {facts.version}, expected {version}")
    for name, kind in (("dp_size", "data"), ("pp_size", "pipeline")):
        if server.get(name, 1) != 1:
            problems.append(
                f"{name} = {server[name]}, must be 1: weights cannot be sent to {kind}-parallel servers; run several "
                "servers instead"
            )
    if facts.context < longest:
        problems.append(f"takes {facts.context} tokens, the longest prompt with its response may have {longest}")
    return problems
