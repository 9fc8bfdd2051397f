"""Names of what lies in a state: tensor names as names of Zarr nodes, percent-encoded where a path or Zarr could
misread them; and those that several modules go by."""

from __future__ import annotations

import functools
import string
from urllib.parse import unquote

from continual.errors import Refuse

RECEIPTS = "receipts.json"
EXPIRED = ".expired-"
"""What the name of a generation begins with that is being deleted."""
_SAFE = frozenset((string.ascii_letters + string.digits + "._-").encode())
_LONGEST = 240


@functools.cache
def encode(name: str) -> str:
    """A file name for the tensor `name`: letters, digits, `.`, `_`, `-` stand for themselves, every other UTF-8 byte as
    %XX.

    A leading `.` and a leading `__` are encoded too (hidden files and names Zarr reserves), and the first letter of
    `zarr.json` (its metadata). Raises Refuse for an empty name or one longer than 240 bytes when encoded.
    """
    out = "".join(chr(byte) if byte in _SAFE else f"%{byte:02X}" for byte in name.encode("utf-8", "surrogatepass"))
    if out.startswith((".", "__")) or out == "zarr.json":
        out = f"%{ord(out[0]):02X}{out[1:]}"
    if not out or len(out) > _LONGEST:
        raise Refuse(
            "name", f"tensor name {name[:60]!r}… is {'empty' if not out else 'too long'}: a state cannot hold it"
        )
    return out


def decode(encoded: str) -> str:
    """The tensor name that `encode` was given."""
    return unquote(encoded, errors="surrogatepass")
