"""Supervises the SGLang servers of this machine: restarts a server whose process has ended.

A server that runs but makes no progress is not restarted here: :mod:`.sglang.health_watcher` leaves it out.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from fipo_megatron.rollout.sglang.server import SglangServer, check_arguments

logger = logging.getLogger(__name__)


class ServerSupervisor:
    """Starts servers, restarts those that end, and stops all of them.

    Args:
        servers: Servers that are not started yet.
        restarts: Most restarts of each server.
        on_lost: Called with the URL of a server as soon as it has ended.
        on_restarted: Called with the URL of a server that answers again, before it is used; sends the current weights.
        interval: Seconds between two checks.
    """

    def __init__(
        self,
        servers: Sequence[SglangServer],
        *,
        restarts: int = 3,
        on_lost: Callable[[str], None] = lambda url: None,
        on_restarted: Callable[[str], Awaitable[None]] | None = None,
        interval: float = 1.0,
    ) -> None:
        self.servers = tuple(servers)
        self.on_lost, self.on_restarted = on_lost, on_restarted
        self._restarts, self._interval = restarts, interval
        self._watchers: list[asyncio.Task[None]] = []

    @property
    def urls(self) -> tuple[str, ...]:
        """URLs of all servers."""
        return tuple(server.url for server in self.servers)

    async def start(self) -> None:
        """Starts all servers in parallel and watches them.

        Raises:
            EngineError: a server did not start; all are stopped.
            ValueError: the installed SGLang does not have an argument.
        """
        check_arguments(self.servers[0].spec)
        results = await asyncio.gather(*(server.start() for server in self.servers), return_exceptions=True)
        if errors := [result for result in results if isinstance(result, BaseException)]:
            await self.close()
            raise errors[0]
        self._watchers = [asyncio.create_task(self._watch(server)) for server in self.servers]

    async def _watch(self, server: SglangServer) -> None:
        while True:
            await asyncio.sleep(self._interval)
            if server.alive:
                continue
            self.on_lost(server.url)
            if server.starts > self._restarts:
                logger.error("the SGLang server at %s ended after %d restarts", server.url, self._restarts)
                return
            logger.warning("the SGLang server at %s ended and is restarted", server.url)
            try:
                await server.start()
                if self.on_restarted is not None:
                    await self.on_restarted(server.url)
            except Exception as error:
                logger.error("%s", error)
                await server.stop()

    async def close(self) -> None:
        """Ends the checks, then stops all servers."""
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        await asyncio.gather(*(server.stop() for server in self.servers))
