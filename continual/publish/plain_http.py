"""Asking another server over HTTP, so that what it answers is seen as it is."""

from __future__ import annotations

import http.client
import ipaddress
import urllib.request
from urllib.parse import urlsplit


class _Plain(urllib.request.HTTPErrorProcessor):
    """Hands on every answer as it is: no redirect is followed, no status is an exception."""

    def http_response(
        self,
        request: urllib.request.Request,  # noqa: ARG002
        response: http.client.HTTPResponse,
    ) -> http.client.HTTPResponse:
        return response

    https_response = http_response


def opener_for(url: str) -> urllib.request.OpenerDirector:
    """What opens `url`: it follows no redirect and raises for no status. A proxy of the environment is used, but never
    for this machine itself. Raises ValueError for an address that is none."""
    direct = [urllib.request.ProxyHandler({})] if is_loopback(urlsplit(url).hostname or "") else []
    return urllib.request.build_opener(_Plain, *direct)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine itself."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
