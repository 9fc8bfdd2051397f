"""Uploads by the Xet protocol, which the client takes whenever `hf_xet` is installed; downloads go over plain HTTP.

Xorbs (chunks, each with a header of 8 bytes: version, packed length, packing, length) are unpacked as they come in; a
shard names the chunks of which each file is made. Of the protocol's parts, upload grants, the second shard API and
finding chunks of others are answered with 404, upon which the client uses what is here.
"""

from __future__ import annotations

import hashlib
import struct
import time
from collections.abc import Iterator

from tests.loopback.access import Refusal
from tests.loopback.routing import Answer, Call, route
from tests.loopback.writing import writable

ENTRY = 48  # bytes of every entry of a shard
VERIFIED, EXTENDED = 1 << 31, 1 << 30


@route("GET", "/api/models/{repo}/xet-write-token/{rev}")
def token(call: Call) -> Answer:
    writable(call)
    until = int(time.time()) + 3600
    # hf_xet remembers by this URL which chunks a server has: a new Hub on an old port must not look like the old one
    url, secret = f"{call.hub.endpoint}/xet/{call.hub.secret.hex()}", "xet-of-the-tests"
    headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": secret, "X-Xet-Token-Expiration": str(until)}
    return Answer.json({"casUrl": url, "accessToken": secret, "exp": until}, headers=headers)


@route("POST", "/xet/{secret}/v1/telemetry")
def telemetry(call: Call) -> Answer:
    return Answer.json({"received": len(call.body)})


@route("POST", "/xet/{secret}/v1/xorbs/{prefix}/{hash}")
def put_xorb(call: Call) -> Answer:
    new = call.args["hash"] not in call.hub.xorbs
    call.hub.xorbs[call.args["hash"]] = list(chunks(call.body))
    return Answer.json({"was_inserted": new})


@route("POST", "/xet/{secret}/v1/shards")
def put_shard(call: Call) -> Answer:
    """Puts the files of the shard together and keeps them as large files."""
    for terms in files(call.body):
        try:
            data = b"".join(piece for xorb, start, end in terms for piece in call.hub.xorbs[xorb][start:end])
        except KeyError as error:
            raise Refusal(400, f"The shard names a xorb that was not uploaded: {error}") from error
        call.hub.objects[hashlib.sha256(data).hexdigest()] = data
    return Answer.json({"result": 1})


def files(shard: bytes) -> Iterator[list[tuple[str, int, int]]]:
    """The terms (xorb, first chunk, end) of each file in a shard; its first section alone, which follows a header of
    one entry."""
    at = ENTRY
    while shard[at : at + 32] != b"\xff" * 32:
        flags, count = struct.unpack_from("<II", shard, at + 32)
        terms = []
        for number in range(1, count + 1):
            *words, _, _, start, end = struct.unpack_from("<4Q4I", shard, at + ENTRY * number)
            terms.append(("".join(f"{word:016x}" for word in words), start, end))
        yield terms
        at += ENTRY * (1 + count + (count if flags & VERIFIED else 0) + (1 if flags & EXTENDED else 0))


def chunks(xorb: bytes) -> Iterator[bytes]:
    """The chunks of a xorb, unpacked; a footer, if there is one, begins with a letter where a version would be 0."""
    at = 0
    while at + 8 <= len(xorb) and xorb[at] == 0:
        packed, size = (int.from_bytes(xorb[at + i : at + i + 3], "little") for i in (1, 5))
        body, packing = xorb[at + 8 : at + 8 + packed], xorb[at + 4]
        data = body if packing == 0 else unpack(body)
        if packing == 2:  # the 1st bytes of all words, then the 2nd ones, ...: floats pack better so
            whole = bytearray(size)
            start = 0
            for group in range(4):
                count = (size - group + 3) // 4
                whole[group::4] = data[start : start + count]
                start += count
            data = bytes(whole)
        if len(data) != size:
            raise Refusal(400, "A chunk has not the length it declares")
        yield data
        at += 8 + packed


def unpack(frame: bytes) -> bytes:
    """Decodes an LZ4 frame (github.com/lz4/lz4/doc: lz4_Frame_format, lz4_Block_format); checksums are not looked
    at."""
    flags = frame[4]
    at = 7 + (8 if flags & 8 else 0) + (4 if flags & 1 else 0)
    out = bytearray()
    while size := int.from_bytes(frame[at : at + 4], "little"):
        at += 4
        block = frame[at : at + (size & 0x7FFFFFFF)]
        at += len(block) + (4 if flags & 16 else 0)
        if size >> 31:
            out += block
        else:
            unpack_block(block, out)
    return bytes(out)


def unpack_block(block: bytes, out: bytearray) -> None:
    """Appends a block to `out`: runs of literals, each followed by a copy of what went before."""

    def length(short: int, at: int) -> tuple[int, int]:
        while short >= 15 and block[at] == 255:
            short, at = short + 255, at + 1
        return (short + block[at], at + 1) if short >= 15 else (short, at)

    at = 0
    while at < len(block):
        sizes = block[at]
        count, at = length(sizes >> 4, at + 1)
        out += block[at : at + count]
        at += count
        if at >= len(block):
            return
        back = int.from_bytes(block[at : at + 2], "little")
        count, at = length(sizes & 15, at + 2)
        count += 4
        start = len(out) - back
        if back >= count:
            out += out[start : start + count]
        else:  # the copy overlaps what it makes
            out += (out[start:] * (count // back + 1))[:count]
