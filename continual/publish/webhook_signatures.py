"""Signing what is posted, after Standard Webhooks 1.0.0 (standardwebhooks.com, symmetric signatures): HMAC-SHA256 over
`ID.TIMESTAMP.BODY`, so that whoever shares the secret knows who sent it, when, and that it is unchanged."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
from collections.abc import Mapping

PREFIX = "whsec_"
"""What a secret begins with, wherever it lies."""
VARIABLE = "env:"
"""What the setting begins with where it names a variable of the environment."""
LEAST, MOST = 24, 64
"""Bytes of a secret."""


def key(setting: str, environ: Mapping[str, str] = os.environ) -> bytes:
    """The bytes of a secret, as `whsec_` and Base64, or of the variable that `env:NAME` names. Raises ValueError, which
    never quotes it."""
    if setting.startswith(VARIABLE):
        name = setting.removeprefix(VARIABLE)
        if name not in environ:
            raise ValueError(f"secret = env:{name}: there is no such variable in the environment")
        setting = environ[name]
    try:
        if not setting.startswith(PREFIX):
            raise ValueError
        found = base64.b64decode(setting.removeprefix(PREFIX), validate=True)
    except (ValueError, binascii.Error):
        raise ValueError(f"secret has to be {PREFIX} and Base64, or env:NAME") from None
    if not LEAST <= len(found) <= MOST:
        raise ValueError(f"secret has {len(found)} bytes, and has to have {LEAST} to {MOST}")
    return found


def headers(secret: bytes, message: str, now: int, body: bytes) -> dict[str, str]:
    """The three headers of a message; `message` is its id, the same at each try, `now` seconds since 1970."""
    mac = hmac.new(secret, f"{message}.{now}.".encode() + body, hashlib.sha256).digest()
    return {
        "webhook-id": message,
        "webhook-timestamp": str(now),
        "webhook-signature": f"v1,{base64.b64encode(mac).decode()}",
    }


def message_id(*parts: object) -> str:
    """The id of the message that these parts are told by: the same for the same parts, for ever."""
    told = "\0".join("" if part is None else str(part) for part in parts)
    return "msg_" + hashlib.sha256(told.encode("utf-8", "surrogateescape")).hexdigest()[:32]
