"""The address at which other hosts reach this one."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from collections.abc import Iterable
from urllib.parse import urlsplit

from fipo_megatron.config.rollout_sections import ServersConfig
from fipo_megatron.rollout.engine import EngineError

LOOPBACK = "127.0.0.1"
_SIOCGIFADDR = 0x8915


def host_address(interface: str | None) -> str:
    """Returns the IPv4 address of this host for other hosts.

    Args:
        interface: Name of a network interface, or an address of this host; None: the address to which the host's name
            resolves.

    Raises:
        EngineError: There is no such interface, it has no IPv4 address, the address belongs to another host, or the
            host's name resolves to no address or to a loopback address; the message lists the interfaces.
    """
    if interface is not None:
        return _address_of(interface)
    name = socket.gethostname()
    try:
        found = socket.gethostbyname(name)
    except OSError as error:
        raise EngineError(
            f"rollout.servers.interface = null: the host name {name} cannot be resolved ({error}); {_choice()}"
        ) from None
    if is_loopback(found):
        raise EngineError(
            f"rollout.servers.interface = null: the host name {name} resolves to {found}, which other hosts cannot "
            f"reach; {_choice()}"
        )
    return found


def is_loopback(host: str) -> bool:
    """Returns whether a host, as it stands in a URL, is this one under a loopback address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def all_local(urls: Iterable[str]) -> bool:
    """Returns whether all URLs have a loopback address, so that this host is reached at one as well."""
    return all(is_loopback(urlsplit(url).hostname or "") for url in urls)


def is_asked_for(servers: ServersConfig, hosts: int = 1) -> bool:
    """Returns whether something outside of this host must reach it, or an interface is given.

    Args:
        servers: Section of the configuration.
        hosts: Number of hosts of the trainer; without effect on running servers.
    """
    if servers.interface is not None:
        return True
    return not all_local(servers.urls) and servers.sync == "distributed" if servers.urls else hosts > 1


def _address_of(interface: str) -> str:
    addresses = _interfaces()
    if interface in addresses:
        return addresses[interface]
    try:
        address = ipaddress.IPv4Address(interface)
        with socket.socket() as probe:
            probe.bind((str(address), 0))
    except (ValueError, OSError):
        raise EngineError(
            f"rollout.servers.interface = {interface}: is neither a network interface with an IPv4 address nor an IPv4 "
            f"address of host {socket.gethostname()}; {_choice()}"
        ) from None
    return str(address)


def _interfaces() -> dict[str, str]:
    """Returns the IPv4 address of every interface that has one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:  # without an IPv4 address
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


def _choice() -> str:
    others = [f"{name} ({address})" for name, address in _interfaces().items() if not is_loopback(address)]
    return "valid here: " + (", ".join(others) or "none, this host has only loopback addresses")
