"""HTTP requests to SGLang servers: their control calls, their health, and the transport of ``/generate``.

:class:`ControlClient` is used in an event loop. :class:`BlockingControlClient` offers the same calls to code that
blocks, such as a weight sender, which takes part in a broadcast while the servers answer.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import aiohttp
import orjson

from fipo_megatron.rollout.engine import EngineError
from fipo_megatron.rollout.event_loop import EventLoopThread
from fipo_megatron.rollout.sglang.responses import error_text

UNAUTHORISED = (401, 403)
"""HTTP statuses of a missing or wrong API key."""

_CONNECT_SECONDS = 10.0
_KEEP_ALIVE_SECONDS = 2.0
"""Must be shorter than a server's own limit of 5 s, after which it closes a connection that is about to be reused."""


class ControlClient:
    """Sends requests to SGLang servers. Create it and use it in one event loop.

    Args:
        api_key: Bearer token of every request.
        timeout: Seconds within which a request must be answered; None for no limit.
    """

    def __init__(self, api_key: str | None = None, *, timeout: float | None = None) -> None:
        self._session = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=aiohttp.ClientTimeout(total=timeout, sock_connect=_CONNECT_SECONDS),
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_SECONDS),
            read_bufsize=1 << 20,
            trust_env=False,  # control calls go to the servers, never to a proxy
        )

    async def __aenter__(self) -> ControlClient:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def exchange(self, url: str, payload: Mapping[str, Any] | None) -> tuple[int, bytes]:
        """Sends one request: POST with a payload, GET without.

        Returns:
            HTTP status and body of the answer.

        Raises:
            aiohttp.ClientError, OSError: the server cannot be reached, or does not answer within the time-out.
        """
        if payload is None:
            async with self._session.get(url) as answer:
                return answer.status, await answer.read()
        data = io.BytesIO(orjson.dumps(payload))  # aiohttp warns of more than 1 MB of bytes in one piece
        async with self._session.post(url, data=data, headers={"Content-Type": "application/json"}) as answer:
            return answer.status, await answer.read()

    async def get(self, url: str, path: str) -> dict[str, Any]:
        """Gets a path of one server; raises like :meth:`post`."""
        return await self._call(url, path, None)

    async def post(self, url: str, path: str, payload: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Posts to a path of one server.

        Returns:
            The JSON object that it answered; any other answer under the key ``answer``.

        Raises:
            EngineError: the call failed; the message names server, path, HTTP status and what the server said.
        """
        return await self._call(url, path, payload or {})

    async def _call(self, url: str, path: str, payload: Mapping[str, Any] | None) -> dict[str, Any]:
        try:
            status, body = await self.exchange(url + path, payload)
        except (aiohttp.ClientError, OSError) as error:
            raise EngineError(f"{url}{path}: cannot be reached: {type(error).__name__}: {error}") from error
        if status in UNAUTHORISED:
            raise EngineError(f"{url}{path}: HTTP status {status}: unauthorised: give the server's API key")
        if status != 200:
            raise EngineError(f"{url}{path}: HTTP status {status}: {error_text(body)}")
        answer = _parse(body)
        if answer.get("success") is False:
            raise EngineError(f"{url}{path}: {answer.get('message') or answer.get('error_message') or answer}")
        return answer

    async def weight_version(self, url: str) -> int:
        """Asks a server for the version of its weights; raises like :meth:`post`."""
        return int((await self.get(url, "/model_info"))["weight_version"])

    async def close(self) -> None:
        """Closes the connections."""
        await self._session.close()


def _parse(body: bytes) -> dict[str, Any]:
    try:
        answer = orjson.loads(body) if body else {}
    except ValueError:
        answer = body.decode(errors="replace")
    return answer if isinstance(answer, dict) else {"answer": answer}


class BlockingControlClient:
    """A :class:`ControlClient` of several servers for code that blocks; requests run in a thread of their own.

    Args:
        urls: URLs of the servers.
        api_key: Bearer token of every request.
        timeout: Seconds within which a request must be answered.
    """

    def __init__(self, urls: Sequence[str], api_key: str | None = None, timeout: float = 600.0) -> None:
        self.urls = tuple(urls)

        async def create() -> ControlClient:
            return ControlClient(api_key, timeout=timeout)

        self._loop = EventLoopThread(name="sglang-control")
        self._client = self._loop.run(create())
        self._closed = False

    def begin(self, path: str, payloads: Mapping[str, Mapping[str, Any]]) -> list[Future[dict[str, Any]]]:
        """Starts a POST of each payload to the URL that is its key.

        Returns:
            A future for each; ``result()`` waits, and raises like :meth:`ControlClient.post`.
        """
        return [self._loop.begin(self._client.post(url, path, payload)) for url, payload in payloads.items()]

    def all(self, path: str, payload: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """Posts the payload to all servers and waits for their answers.

        Raises:
            EngineError: a call failed; see :meth:`ControlClient.post`.
        """
        return [call.result() for call in self.begin(path, {url: payload or {} for url in self.urls})]

    def close(self) -> None:
        """Cancels requests in flight, closes the connections and ends the thread."""
        if self._closed:
            return
        self._closed = True
        self._loop.run(self._client.close())
        self._loop.close()
