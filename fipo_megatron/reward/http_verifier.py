"""A verifier behind a URL. Nothing that the service sends is trusted: its size, its types and its redirects."""

from __future__ import annotations

import asyncio
import json
import math
import zlib
from typing import Any

import aiohttp

from fipo_megatron.reward.verifier_protocol import Answer, CountingVerifier, Verdict

_BODY_BYTES = 1 << 20
_EXTRACTED_BYTES = 4 << 10
_GZIP_OR_ZLIB = 47
"""Window bits with which zlib recognises both formats."""


class HttpVerifier(CountingVerifier):
    """Checks with a service: POST of ``prompt``, ``response``, ``ground_truth`` and ``data_source`` as JSON.

    The service replies ``{"correct": true}``, where a number in [0, 1] may stand for the bool, or ``{"score": 1.0}``; a
    number above 0 is right. An optional ``"extracted"`` is the text that it took for the answer, of at most 4 KiB. A
    reply of more than 1 MiB, another status than 200 (redirects are not followed) or another type is a failure.

    Args:
        url: URL of the service.
        concurrency: Number of answers at a time.
        seconds: Time limit of one request in seconds.
        attempts: Number of requests per answer if the service fails. A request that timed out is not repeated.
    """

    def __init__(self, url: str, concurrency: int, seconds: float, attempts: int = 3) -> None:
        super().__init__()
        self._url, self._attempts, self._concurrency = url, attempts, concurrency
        self._timeout = aiohttp.ClientTimeout(total=seconds)
        self._slots = asyncio.Semaphore(concurrency)
        self._session: aiohttp.ClientSession | None = None

    async def verify(self, answer: Answer) -> Verdict:
        """Checks one answer, with retries if the service fails; see :class:`Verifier`."""
        async with self._slots:
            for attempt in range(self._attempts):
                if attempt:
                    await asyncio.sleep(0.05 * 2**attempt)
                verdict = await self._request(answer)
                if verdict.failure in ("", "timeout"):
                    break
        return self._counted(verdict)

    async def _request(self, answer: Answer) -> Verdict:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                timeout=self._timeout,
                connector=aiohttp.TCPConnector(limit=self._concurrency),
                headers={"Accept-Encoding": "identity"},
                auto_decompress=False,
            )
        payload = {
            "prompt": answer.prompt,
            "response": answer.response,
            "ground_truth": answer.ground_truth,
            "data_source": answer.data_source,
        }
        try:
            async with self._session.post(self._url, json=payload, allow_redirects=False) as reply:
                if reply.status != 200:
                    return self._failure("error", f"status {reply.status} {reply.reason or ''}".rstrip())
                content = await _read_body(reply)
            return _parse_verdict(json.loads(content))
        except TimeoutError:
            return self._failure("timeout", f"no reply within {self._timeout.total:g} s")
        except (aiohttp.ClientError, OSError) as error:
            return self._failure("unreachable", f"{type(error).__name__}: {error}")
        except RecursionError:
            return self._failure("error", "its reply is JSON of too many levels")
        except (ValueError, OverflowError, zlib.error) as error:
            return self._failure("error", f"its reply is not valid: {error}")

    def _failure(self, kind: str, detail: str) -> Verdict:
        return Verdict(False, failure=kind, detail=f"{self._url}: {detail:.300}")

    async def close(self) -> None:
        """Closes the connections; see :class:`Verifier`."""
        if self._session is not None:
            await self._session.close()


async def _read_body(reply: aiohttp.ClientResponse) -> bytes:
    """Returns the body of a reply, decompressed.

    Raises:
        ValueError: The body is longer than 1 MiB, compressed or not, or its encoding is unknown.
        zlib.error: The compressed body is damaged.
    """
    body = b""
    async for chunk in reply.content.iter_chunked(1 << 16):
        body += chunk
        if len(body) > _BODY_BYTES:
            raise ValueError(f"more than {_BODY_BYTES} bytes")
    encoding = reply.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding in ("gzip", "deflate"):
        body = zlib.decompressobj(_GZIP_OR_ZLIB).decompress(body, _BODY_BYTES + 1)
    elif encoding not in ("", "identity"):
        raise ValueError(f"Content-Encoding = {encoding!r}")
    if len(body) > _BODY_BYTES:
        raise ValueError(f"more than {_BODY_BYTES} bytes after decompression")
    return body


def _parse_verdict(content: Any) -> Verdict:
    """Returns the verdict in a reply.

    Raises:
        ValueError: The reply has another form than documented; the message names the field.
    """
    if not isinstance(content, dict):
        raise ValueError(f"must be an object, got {type(content).__name__}")
    field = "correct" if "correct" in content else "score"
    value = content.get(field)
    if not isinstance(value, bool | int | float):
        raise ValueError(f"{field}: must be a bool or a number, got {value!r:.100}")
    if not math.isfinite(value) or (field == "correct" and not 0 <= value <= 1):
        raise ValueError(f"{field}: must be {'in [0, 1]' if field == 'correct' else 'finite'}, got {value!r:.100}")
    extracted = content.get("extracted")
    if extracted is not None and not isinstance(extracted, str):
        raise ValueError(f"extracted: must be text, got {type(extracted).__name__}")
    if extracted is not None and len(extracted.encode(errors="replace")) > _EXTRACTED_BYTES:
        raise ValueError(f"extracted: must have at most {_EXTRACTED_BYTES} bytes")
    return Verdict(value > 0, extracted)
