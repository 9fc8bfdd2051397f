"""Signatures of webhooks: the vector of the standard's own libraries, what a secret may be, what an id goes by."""

from __future__ import annotations

import base64

import pytest

from continual.publish import webhook_signatures
from continual.publish.webhook_signatures import headers, key, message_id

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


def test_the_vector_of_the_standard() -> None:
    assert headers(key(SECRET), "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}') == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


def test_a_secret_may_lie_in_the_environment() -> None:
    assert key("env:MERGED", {"MERGED": SECRET}) == key(SECRET)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "has to be whsec_ and Base64"),
        ("whsec_no base 64!", "has to be whsec_ and Base64"),
        ("whsec_" + base64.b64encode(b"x" * 23).decode(), "has 23 bytes"),
        ("whsec_" + base64.b64encode(b"x" * 65).decode(), "has 65 bytes"),
        ("env:NOWHERE", "env:NOWHERE: there is no such variable"),
        ("", "has to be"),
    ],
)
def test_a_secret_that_is_none_is_refused_and_not_quoted(setting: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as refused:
        key(setting, {})
    assert not setting.startswith("whsec_") or setting[6:] not in str(refused.value)


def test_an_id_tells_its_parts_apart() -> None:
    assert message_id("a", 1, None) == message_id("a", 1, None)
    ids = {message_id("a", 1), message_id("a1"), message_id("a", 2), message_id("a", 1, "v"), message_id("b\udcff", 1)}
    assert len(ids) == 5
    assert all(one.startswith("msg_") and "." not in one for one in ids)
    assert webhook_signatures.PREFIX == "whsec_"
