"""By which names the service may be asked. A web page that a browser on this machine shows can give its own name the
address of the service (DNS rebinding), and would read what is answered; the header `Host` then has that name. Pure."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection

_PORT = re.compile(r"(:[0-9]*)?")


def may_ask(host: str | None, names: Collection[str]) -> bool:
    """Whether a request with this `Host` header is answered: an address, localhost, or one of `names`. A client without
    the header (HTTP/1.0) is no browser."""
    if host is None:
        return True
    name = bare(host)
    return name == "localhost" or _is_address(name) or name in {bare(known) for known in names}


def bare(host: str) -> str:
    """A host without its port, in small letters; all of it where what follows the host is no port."""
    name = host.strip().lower()
    if name.startswith("["):
        inner, end, port = name[1:].partition("]")
        return inner if end and _PORT.fullmatch(port) else name
    if name.count(":") == 1 and _PORT.fullmatch(name[name.index(":") :]):
        name = name.partition(":")[0]
    return name.removesuffix(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
