"""Checks URLs before anything is sent to them."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

_UNSAFE = re.compile(r"[\s\x00-\x1f\x7f]")


def url_problem(url: str) -> str:
    """Returns what a URL of a service must be and is not; an empty string if it can be used."""
    if not url.startswith(("http://", "https://")):
        return "must begin with http:// or https://"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        return "must have a port from 1 to 65535, and an IPv6 address in brackets"
    if not host or _UNSAFE.search(url):
        return "must name a host, without spaces"
    if port == 0:
        return "must have a port from 1 to 65535"
    return ""
