"""The engines of ``fipo compare swap``: one embedded engine with both models, or SGLang servers of each model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch.distributed as dist

from fipo_megatron.compare.swap_points import CALIBRATED, Role, second_of
from fipo_megatron.config import Config, ModelConfig
from fipo_megatron.evaluation.evaluation_inputs import EvaluationInputs
from fipo_megatron.evaluation.standalone import only_host
from fipo_megatron.rollout.embedded.drawing import PrimaryAlone, Selector, Swap
from fipo_megatron.rollout.embedded.embedded_engine import EmbeddedEngine
from fipo_megatron.rollout.engine import EngineError, Generation, GenerationRequest, ResponseEngine
from fipo_megatron.rollout.engine_factory import HostInfo, embedded_settings, open_engine
from fipo_megatron.rollout.sglang.client import SglangClient
from fipo_megatron.rollout.sglang.swapping_engine import SwappingEngine
from fipo_megatron.rollout.store_coordinator import StoreCoordinator

ROLES: tuple[Role, ...] = ("base", "rl")


class TwoModelEngine(ResponseEngine, Protocol):
    """An engine in which one model draws and the other one replaces tokens."""

    def select(self, selector: Selector | None, threshold: float | None) -> None:
        """Sets which tokens of later requests are replaced.

        Args:
            selector: Quantity that selects; None: the primary model draws alone, and ``Generation.quantities`` has the
                first columns of :data:`.swap_points.CALIBRATED`.
            threshold: Threshold of the quantity.
        """


Open = Callable[[Role], AbstractAsyncContextManager[TwoModelEngine]]
"""Opens the engine in which a model is the primary one."""


@asynccontextmanager
async def two_model_engines(
    config: Config, inputs: EvaluationInputs, models: Mapping[Role, Path], logs: Path
) -> AsyncIterator[Open]:
    """Yields a function that opens engines; starts servers first, or connects to them.

    Args:
        config: Configuration of the comparison.
        inputs: Tokenizer and vocabulary of both models.
        models: Hugging Face directories of the models.
        logs: Directory for the logs of servers.

    Raises:
        EngineError: Servers do not start, cannot be reached, or serve another model.
    """
    if config.rollout.engine == "embedded":
        yield lambda primary: _embedded(config, models, primary)
        return
    async with _clients(config, inputs, models, logs) as clients:

        def open_one(primary: Role) -> AbstractAsyncContextManager[TwoModelEngine]:
            drafts, replaces = clients[primary].requests, clients[second_of(primary)].requests
            return nullcontext(_Served(SwappingEngine(drafts, replaces, config.compare.draft_tokens)))

        yield open_one


class _Embedded(EmbeddedEngine):
    """An embedded engine as a :class:`TwoModelEngine`."""

    def select(self, selector: Selector | None, threshold: float | None) -> None:
        """Sets the rule; see :meth:`TwoModelEngine.select`."""
        if selector is None:
            self.rule = PrimaryAlone(CALIBRATED)
        else:
            assert threshold is not None
            self.rule = Swap(selector, threshold)


@dataclass(frozen=True)
class _Served:
    """Servers of two models as a :class:`TwoModelEngine`; they select by ``delta`` only."""

    engine: SwappingEngine

    async def generate(self, request: GenerationRequest) -> Generation:
        """Samples one response; see :meth:`.engine.RolloutEngine.generate`."""
        return await self.engine.generate(request)

    def select(self, selector: Selector | None, threshold: float | None) -> None:
        """Sets the threshold; see :meth:`TwoModelEngine.select`."""
        assert selector in (None, "delta")
        self.engine.threshold = threshold


@asynccontextmanager
async def _embedded(config: Config, models: Mapping[Role, Path], primary: Role) -> AsyncIterator[TwoModelEngine]:
    second = models[second_of(primary)], PrimaryAlone(CALIBRATED)
    engine = _Embedded(models[primary], **embedded_settings(config), second=second)
    try:
        yield engine
    finally:
        await engine.close()


@asynccontextmanager
async def _clients(
    config: Config, inputs: EvaluationInputs, models: Mapping[Role, Path], logs: Path
) -> AsyncIterator[Mapping[Role, SglangClient]]:
    """Yields a client of the servers of each model."""
    hosts, clients = hosts_of(config, logs), dict[Role, SglangClient]()
    async with AsyncExitStack() as stack:

        async def connect(role: Role) -> None:
            coordinator, starters = (StoreCoordinator(dist.HashStore(), 0) for _ in range(2))
            own = replace(_with_urls(config, role), model=ModelConfig(str(models[role])))
            vocab = inputs.architecture.vocab
            opened = await open_engine(own, hosts[role], coordinator, starters, inputs.tokenizer, vocab)
            stack.push_async_callback(opened.close)
            assert isinstance(opened.engine, SglangClient)
            clients[role] = opened.engine
            await _check_served(opened.engine, role, models)

        ended = await asyncio.gather(*map(connect, ROLES), return_exceptions=True)
        if failures := [each for each in ended if each is not None]:
            raise failures[0]
        yield clients


def _with_urls(config: Config, role: Role) -> Config:
    """Returns the configuration of the servers of a model."""
    urls = config.compare.base_urls if role == "base" else config.compare.rl_urls
    servers = replace(config.rollout.servers, urls=urls, colocated=False)  # no actor shares the memory
    return replace(config, rollout=replace(config.rollout, servers=servers))


def hosts_of(config: Config, logs: Path) -> dict[Role, HostInfo]:
    """Returns this host as the servers of each model see it: they have their own GPUs and directory of logs.

    Raises:
        EngineError: The host has too few GPUs.
    """
    per_host, config = config.rollout.servers.per_host, _with_urls(config, "base")
    both = replace(config.rollout, servers=replace(config.rollout.servers, per_host=len(ROLES) * per_host))
    try:
        host = only_host(replace(config, rollout=both), logs)
    except EngineError as error:
        raise EngineError(f"rollout.servers.per_host = {per_host}, for each of two models: {error}") from None
    found: dict[Role, HostInfo] = {}
    for number, role in enumerate(ROLES):
        gpus = host.gpus
        if gpus is not None:
            gpus = replace(gpus, first=gpus.first[number * per_host : (number + 1) * per_host])
        found[role] = replace(host, directory=logs / f"servers-{role}", gpus=gpus)
    return found


async def _check_served(client: SglangClient, role: Role, models: Mapping[Role, Path]) -> None:
    """Checks that no server has loaded the other model, whose architecture and tokenizer may be the same.

    Raises:
        EngineError: A server has.
    """
    own, other = (models[each].resolve() for each in (role, second_of(role)))
    for url, facts in (await client.look_up("/model_info")).items():
        loaded = Path(str(facts.get("model_path"))).resolve()
        if int(facts["weight_version"]) == 0 and loaded == other != own:  # later versions were sent to it
            raise EngineError(
                f"compare.{role}_urls = {url}: serves {loaded}, which is compare.{second_of(role)}; must serve {own}"
            )
