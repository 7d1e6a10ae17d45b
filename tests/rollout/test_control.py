"""The HTTP client of SGLang servers, with a server that answers what each path is named after."""

import asyncio
import contextlib
import threading

import pytest
from aiohttp import web

from fipo_megatron.rollout.engine import EngineError
from fipo_megatron.rollout.event_loop import EventLoopThread
from fipo_megatron.rollout.sglang.control import BlockingControlClient, ControlClient
from fipo_megatron.rollout.sglang.server import free_port

KEY = "secret"


async def answer(request):
    if request.headers.get("Authorization") != f"Bearer {KEY}":
        return web.Response(status=401)
    match request.path:
        case "/echo":
            body = await request.json() if request.can_read_body else None
            return web.json_response({"method": request.method, "body": body})
        case "/text":
            return web.Response(text="done")
        case "/list":
            return web.json_response([1, 2])
        case "/empty":
            return web.Response()
        case "/refused":
            return web.json_response({"success": False, "message": "no such group"})
        case "/broken":
            return web.json_response({"error": {"message": "out of memory"}}, status=500)
        case "/model_info":
            return web.json_response({"weight_version": "7"})
        case "/never":
            await asyncio.sleep(3600)
    return web.Response(status=404, text="no such path")


@pytest.fixture(scope="module")
def url():
    loop, port = EventLoopThread(name="server"), free_port("127.0.0.1")

    async def start():
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path}", answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        return runner

    runner = loop.run(start())
    yield f"http://127.0.0.1:{port}"
    loop.run(runner.cleanup())
    loop.close()


def call(use, key=KEY, **options):
    async def run():
        async with ControlClient(key, **options) as client:
            return await use(client)

    return asyncio.run(run())


def test_answers_are_objects(url):
    async def use(client):
        return [
            await client.get(url, "/echo"),
            await client.post(url, "/echo"),
            await client.post(url, "/echo", {"a": [1.5]}),
            *[await client.post(url, path) for path in ("/text", "/list", "/empty")],
        ]

    assert call(use) == [
        {"method": "GET", "body": None},
        {"method": "POST", "body": {}},
        {"method": "POST", "body": {"a": [1.5]}},
        {"answer": "done"},
        {"answer": [1, 2]},
        {},
    ]
    assert call(lambda client: client.weight_version(url)) == 7


@pytest.mark.parametrize(
    ("path", "key", "message"),
    [
        ("/refused", KEY, "/refused: no such group"),
        ("/broken", KEY, "/broken: HTTP status 500: out of memory"),
        ("/missing", KEY, "/missing: HTTP status 404: no such path"),
        ("/echo", "wrong", "/echo: HTTP status 401: unauthorised: give the server's API key"),
        ("/echo", None, "/echo: HTTP status 401: unauthorised: give the server's API key"),
        ("/never", KEY, "/never: cannot be reached: TimeoutError: "),
    ],
)
def test_errors_name_server_path_and_reason(url, path, key, message):
    with pytest.raises(EngineError) as raised:
        call(lambda client: client.post(url, path), key, timeout=1.0)
    assert str(raised.value) == url + message


def test_a_server_that_cannot_be_reached_is_named():
    with pytest.raises(EngineError, match=r"^http://127.0.0.1:9/echo: cannot be reached: ClientConnectorError: "):
        call(lambda client: client.get("http://127.0.0.1:9", "/echo"))


def test_no_call_goes_through_a_proxy(url, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert call(lambda client: client.weight_version(url)) == 7
    with contextlib.closing(BlockingControlClient([url], KEY)) as servers:
        assert servers.all("/text") == [{"answer": "done"}]


def test_the_blocking_client_calls_all_servers_while_the_caller_goes_on(url):
    """The caller does something else between :meth:`begin` and ``result()``; bodies may be large."""
    with contextlib.closing(BlockingControlClient([url, url.replace("127.0.0.1", "localhost")], KEY)) as servers:
        payload = {"tensors": "x" * (3 << 20)}
        calls = servers.begin("/echo", dict.fromkeys(servers.urls, payload))
        assert [found.result()["body"] == payload for found in calls] == [True, True]
        assert servers.all("/text") == [{"answer": "done"}] * 2
        with pytest.raises(EngineError, match=r"/broken: HTTP status 500"):
            servers.all("/broken")


def test_closing_ends_requests_in_flight_and_the_thread(url):
    before = {*threading.enumerate()}
    servers = BlockingControlClient([url], KEY)
    [call] = servers.begin("/never", {url: {}})
    servers.close()
    servers.close()
    assert call.done()
    assert not {*threading.enumerate()} - before
