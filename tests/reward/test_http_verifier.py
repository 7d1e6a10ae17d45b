"""A verifier behind a URL that sends too much, other types, redirects, or nothing; over real HTTP."""

import asyncio
import gzip
import json
import resource
import zlib
from collections import Counter

import pytest
from aiohttp import web

from fipo_megatron.reward.verifier import open_verifier
from fipo_megatron.reward.verifier_protocol import Answer
from tests.reward.test_verifier import config

pytestmark = pytest.mark.timeout(60)
MIB = 1 << 20


def ask(handle, answers, **changes):
    """Returns the verdicts of a service that answers every path with ``handle``."""

    async def run():
        app = web.Application(client_max_size=64 * MIB)
        app.router.add_route("*", "/{path:.*}", handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]
        verifier = open_verifier(config(f"http://127.0.0.1:{port}/check", **changes))
        try:
            return await asyncio.gather(*(verifier.verify(answer) for answer in answers))
        finally:
            await verifier.close()
            await runner.cleanup()

    return asyncio.run(run())


def verdict_on(body, **headers):
    async def handle(request):
        return web.Response(body=body, headers=headers)

    return ask(handle, [Answer("a", "b")])[0]


def test_a_compressed_reply_is_read_and_a_bomb_is_not():
    reply = json.dumps({"correct": True, "extracted": "34"}).encode()
    for name, content in (("gzip", gzip.compress(reply)), ("deflate", zlib.compress(reply))):
        verdict = verdict_on(content, **{"Content-Encoding": name})
        assert (verdict.correct, verdict.extracted, verdict.failure) == (True, "34", "")
    bomb = gzip.compress(b'{"correct": true, "x": "' + b"a" * (256 * MIB) + b'"}', 9)
    assert len(bomb) < MIB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    verdict = verdict_on(bomb, **{"Content-Encoding": "gzip"})
    assert verdict.failure == "error"
    assert "more than 1048576 bytes after decompression" in verdict.detail
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10
    assert verdict_on(b"xyz", **{"Content-Encoding": "gzip"}).failure == "error"
    assert "Content-Encoding = 'br'" in verdict_on(reply, **{"Content-Encoding": "br"}).detail


def test_a_long_reply_is_not_read():
    verdict = verdict_on(b'{"correct": true, "x": "' + b"a" * (32 * MIB) + b'"}')
    assert verdict.failure == "error"
    assert "more than 1048576 bytes" in verdict.detail


def test_redirects_are_not_followed():
    seen = []

    async def handle(request):
        seen.append(request.path)
        if request.path == "/check":
            raise web.HTTPTemporaryRedirect("/elsewhere")
        return web.json_response({"correct": True})

    [verdict] = ask(handle, [Answer("secret", "b")])
    assert verdict.failure == "error"
    assert "status 307" in verdict.detail
    assert set(seen) == {"/check"}


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("[" * 200_000, "too many levels"),
        ('{"correct": ' + "[" * 200_000, "too many levels"),
        ("[true]", "must be an object, got list"),
        ("{}", "score: must be a bool or a number, got None"),
        ('{"correct": "yes"}', "correct: must be a bool or a number, got 'yes'"),
        ('{"correct": null, "score": 1}', "correct: must be a bool or a number, got None"),
        ('{"correct": 2}', "correct: must be in [0, 1], got 2"),
        ('{"correct": -0.5}', "correct: must be in [0, 1]"),
        ('{"correct": NaN}', "correct: must be in [0, 1], got nan"),
        ('{"score": Infinity}', "score: must be finite, got inf"),
        ('{"score": 1' + "0" * 400 + "}", "its reply is not valid"),
        ('{"score": 1' + "0" * 9000 + "}", "its reply is not valid"),
        ('{"correct": true, "extracted": 34}', "extracted: must be text, got int"),
        ('{"correct": true, "extracted": "' + "a" * 4097 + '"}', "extracted: must have at most 4096 bytes"),
        (b"\xff\xfe{", "its reply is not valid"),
        ("<html>", "its reply is not valid"),
        ("", "its reply is not valid"),
    ],
)
def test_a_reply_of_another_form_is_a_failure_that_names_the_field(body, text):
    verdict = verdict_on(body.encode() if isinstance(body, str) else body)
    assert (verdict.correct, verdict.failure) == (False, "error")
    assert text in verdict.detail
    assert len(verdict.detail) < 400


def test_numbers_and_surrogates_are_read():
    assert verdict_on(b'{"correct": 1}').correct
    assert not verdict_on(b'{"correct": 0.0}').correct
    assert verdict_on(b'{"score": 7.5, "extracted": null}').correct
    assert verdict_on(b'{"correct": true, "extracted": "\\ud800"}').failure == ""


def test_a_time_out_is_not_repeated_and_other_failures_are():
    asked = Counter()

    async def handle(request):
        name = (await request.json())["response"]
        asked[name] += 1
        if name == "slow":
            await asyncio.sleep(60)
        return web.Response(status=500)

    slow, broken = ask(handle, [Answer("slow", ""), Answer("broken", "")], verifier_seconds=0.5)
    assert (slow.failure, broken.failure) == ("timeout", "error")
    assert "no reply within 0.5 s" in slow.detail
    assert "status 500" in broken.detail
    assert asked == {"slow": 1, "broken": 3}


def test_waiting_for_a_turn_is_not_time_of_the_request():
    """12 answers of 0.2 s, two at a time, take longer than the limit of one request."""

    async def handle(request):
        await asyncio.sleep(0.2)
        return web.json_response({"correct": True})

    assert all(verdict.correct for verdict in ask(handle, [Answer("a", "b")] * 12, verifier_seconds=0.7))
