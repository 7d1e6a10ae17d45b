"""The address for other hosts is never a loopback address by accident; the resolver and the interfaces are real."""

import socket

import pytest

from fipo_megatron.rollout.engine import EngineError
from fipo_megatron.rollout.host_address import all_local, host_address


def test_a_host_name_that_resolves_to_a_loopback_address_is_refused(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    with pytest.raises(EngineError) as raised:
        host_address(None)
    assert str(raised.value).startswith(
        "rollout.servers.interface = null: the host name localhost resolves to 127.0.0.1, which other hosts cannot "
        "reach; valid here: "
    )


def test_a_host_name_without_an_address_is_refused(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    with pytest.raises(EngineError, match=r"the host name no-such-host\.invalid cannot be resolved"):
        host_address(None)


def test_a_host_name_with_an_address(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "10.1.2.3")
    assert host_address(None) == "10.1.2.3"


def test_an_interface_or_an_address_of_this_host():
    assert host_address("lo") == "127.0.0.1"
    assert host_address("127.0.0.2") == "127.0.0.2"
    for interface in ("nosuch0", "198.51.100.1", "::1"):
        with pytest.raises(
            EngineError, match=f"rollout.servers.interface = {interface}: is neither a network interface"
        ):
            host_address(interface)


def test_urls_of_this_host():
    assert all_local(["http://127.0.0.1:3", "http://localhost:3", "https://[::1]:3", "http://127.0.1.1:3"])
    assert not all_local(["http://127.0.0.1:3", "http://node7:3"])
    assert not all_local(["http://10.0.0.7:3"])
