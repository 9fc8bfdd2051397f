"""Real signatures by `model-signing`: of exports, adapters and releases, asked for by the command and by the gate; what
was altered, added or left out is seen, and the library says the same of what we sign."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from continual import api, making
from continual.config import Settings
from continual.errors import Misconfigured, Refuse, Retry
from continual.service import release as releasing
from continual.signing import signer
from continual.signing.trust import Trusted, verify
from continual.tensors import Folder, Place
from tests.helpers import adapters, hubs, models
from tests.helpers.command import machine, run
from tests.helpers.released import REPO
from tests.loopback import serving

pytestmark = pytest.mark.slow
library = pytest.importorskip("model_signing", reason="continual[signing] is not installed")
x509 = pytest.importorskip("cryptography.x509", reason="continual[signing] is not installed")


UNUSED = (
    *("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "crl_sign", "encipher_only"),
    "decipher_only",
)


class Keys:
    """Keys of two people, and a certificate of the first below a root of its own, as files."""

    def __init__(self, place: Path) -> None:
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        place.mkdir()
        self.pem: dict[str, Path] = {}
        self.public: dict[str, Path] = {}
        made = {}
        for name in ("ours", "theirs", "root"):
            key = made[name] = ec.generate_private_key(ec.SECP256R1())
            text, bare = serialization.Encoding.PEM, serialization.NoEncryption()
            self.pem[name], self.public[name] = place / f"{name}.pem", place / f"{name}.pub"
            self.pem[name].write_bytes(key.private_bytes(text, serialization.PrivateFormat.PKCS8, bare))
            form = serialization.PublicFormat.SubjectPublicKeyInfo
            self.public[name].write_bytes(key.public_key().public_bytes(text, form))
        now = datetime.now(UTC)
        self.certificates: dict[str, Path] = {}
        for name, of in (("root", "root"), ("leaf", "ours")):
            subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
            issuer = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "root")])
            builder = x509.CertificateBuilder(issuer, subject, made[of].public_key(), x509.random_serial_number())
            builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
            builder = builder.add_extension(x509.BasicConstraints(ca=name == "root", path_length=None), critical=True)
            usage = dict.fromkeys(UNUSED, False)
            ca = name == "root"
            builder = builder.add_extension(
                x509.KeyUsage(digital_signature=not ca, key_cert_sign=ca, **usage), critical=True
            )
            if not ca:
                used = x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.CODE_SIGNING])
                builder = builder.add_extension(used, critical=False)
            self.certificates[name] = place / f"{name}.crt"
            signed = builder.sign(made["root"], hashes.SHA256())
            self.certificates[name].write_bytes(signed.public_bytes(serialization.Encoding.PEM))

    def trusted(self, name: str) -> Trusted:
        return Trusted(keys=(str(self.public[name]),))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys(tmp_path_factory.mktemp("keys") / "k")


def signed(place: Path, keys: Keys, **said: object) -> tuple[Path, Settings]:
    """A signed export of a state of two models, and the settings that signed it."""
    base = models.base(place / "base")
    making.init(base, place / "state")
    wanted = Settings.model_validate({"state": place / "state", "signing": {"key": keys.pem["ours"], **said}})
    with api.Merge(wanted, write=True) as merge:
        for seed, name in enumerate(("alice", "bob")):
            merge.fold(models.fine_tune(base, place / name, seed))
        return merge.export(place / "merged"), wanted


def altered(directory: Path) -> None:
    file = directory / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def lied(directory: Path) -> None:
    body = json.loads((directory / "continual.json").read_text())
    (directory / "continual.json").write_text(json.dumps(body | {"seq": 99}))


SPOILED: dict[str, Callable[[Path], object]] = {
    "a bit of the weights": altered,
    "the record that it says it is": lied,
    "a file more": lambda d: (d / "adapter_config.json").write_text("{}"),
    "a hidden file more": lambda d: (d / ".hidden").write_text("x"),
    "a file in a new folder": lambda d: ((d / "new").mkdir(), (d / "new/x.json").write_text("{}")),
    "a file less": lambda d: (d / "config.json").unlink(),
    "a link out": lambda d: (d / "config.json").unlink() or (d / "config.json").symlink_to("/etc/hostname"),
    "no signature": lambda d: (d / "model.sig").unlink(),
    "an empty signature": lambda d: (d / "model.sig").write_bytes(b""),
    "no JSON": lambda d: (d / "model.sig").write_bytes(b"\xff" * 100),
    "deep JSON": lambda d: (d / "model.sig").write_bytes(b"[" * 100_000),
    "other JSON": lambda d: (d / "model.sig").write_text('{"dsseEnvelope": {"payload": "AA==", "signatures": []}}'),
    "a pipe": lambda d: os.mkfifo(d / "pipe"),
}


def test_an_export_is_signed_and_what_is_spoiled_is_seen(tmp_path: Path, keys: Keys) -> None:
    merged, _ = signed(tmp_path, keys)
    found = verify(Folder(merged), keys.trusted("ours"))
    assert found.files == len([file for file in merged.rglob("*") if file.is_file()]) - 1
    with pytest.raises(Refuse, match=r"its signature is not of the key .*theirs\.pub"):
        verify(Folder(merged), keys.trusted("theirs"))
    both = Trusted(keys=(str(keys.public["theirs"]), str(keys.public["ours"])))
    assert verify(Folder(merged), both).by.endswith("ours.pub")
    said = machine("verify", "--signature", merged, "--key", keys.public["ours"])
    assert (said["files"], said["seq"]) == (found.files, 2)
    done = run("verify", "--signature", merged, "--key", keys.public["theirs"])
    assert (done.returncode, "signature is not of" in done.stderr) == (1, True), done.stderr
    assert run("verify", "--signature", merged).returncode == 2
    assert run("verify", "--key", keys.public["ours"]).returncode == 2
    for name, spoil in SPOILED.items():
        copy = tmp_path / "copy"
        subprocess.run(["cp", "-r", merged, copy], check=True)
        spoil(copy)
        with pytest.raises(Refuse) as refusal:
            verify(Folder(copy, root=tmp_path), keys.trusted("ours"))
        assert refusal.value.reason in ("signature", "no-file", "outside"), name
        assert "\n" not in str(refusal.value)
        subprocess.run(["rm", "-r", copy], check=True)


def test_the_library_itself_verifies_what_is_signed_here_and_signs_what_is_verified_here(
    tmp_path: Path, keys: Keys
) -> None:
    from model_signing import hashing, signing, verifying

    merged, _ = signed(tmp_path, keys)
    verifier = verifying.Config().use_elliptic_key_verifier(public_key=keys.public["ours"])
    verifier.verify(merged, merged / "model.sig")
    altered(merged)
    with pytest.raises(ValueError, match=r"Hash mismatch for .*model\.safetensors"):
        verifying.Config().use_elliptic_key_verifier(public_key=keys.public["ours"]).verify(
            merged, merged / "model.sig"
        )
    theirs, at = tmp_path / "alice", tmp_path / "alice/model.sig"
    hashed = hashing.Config().set_ignored_paths(paths=[at], ignore_git_paths=True)
    signs = signing.Config().use_elliptic_key_signer(private_key=keys.pem["theirs"])
    signs.set_hashing_config(hashed).sign(theirs, at)
    assert verify(Folder(theirs), keys.trusted("theirs")).files == 2


def test_a_certificate_signs_and_its_root_is_trusted(tmp_path: Path, keys: Keys) -> None:
    chain = {"certificate": keys.certificates["leaf"], "chain": [keys.certificates["root"]]}
    merged, _ = signed(tmp_path, keys, **chain)
    root = Trusted(certificates=(str(keys.certificates["root"]),))
    assert verify(Folder(merged), root).by.startswith("a certificate below")
    altered(merged)
    with pytest.raises(Refuse, match="Signature mismatch"):
        verify(Folder(merged), root)


def test_what_cannot_sign_is_said_before_anything_is_written(tmp_path: Path, keys: Keys) -> None:
    _, wanted = signed(tmp_path, keys)
    wrong = {
        "no such file": {"key": tmp_path / "none.pem"},
        "cannot be used": {"key": keys.public["ours"]},
        "one of them signs": {"key": keys.pem["ours"], "sigstore": True},
        "set signing.key": {"certificate": keys.certificates["leaf"]},
        "set signing.certificate": {"key": keys.pem["ours"], "chain": [keys.certificates["root"]]},
    }
    for said, table in wrong.items():
        other = wanted.model_copy(update={"signing": type(wanted.signing).model_validate(table)})
        with api.Merge(other) as merge, pytest.raises(Misconfigured, match=said):
            merge.export(tmp_path / "other")
        with pytest.raises(Misconfigured, match=said):
            signer.check(other.signing)
    assert not list(tmp_path.glob("*other*"))


def test_adapters_are_signed_and_releases_as_they_are_on_the_hub(tmp_path: Path, keys: Keys) -> None:
    with serving() as hub:
        base = hubs.made(tmp_path, hub)
        state = tmp_path / "adapters"
        making.init(base, state, making.Recipe(width=64))
        asked = {
            "release": {"repo": REPO},
            "current": tmp_path / "current",
            "signing": {"key": keys.pem["ours"]},
            "views": {"v": {"as_lora": "own", "repo": "me/view"}},
            "max_base_ratio": 100.0,
        }
        with hubs.merge(state, hub, **asked) as merge:
            merge.fold(adapters.lora(tmp_path / "a", base, 1))
            releasing.release(merge)
            releasing.release(merge, view="v")
        for repo in (REPO, "me/view"):
            place = tmp_path / repo.replace("/", "-")
            commit = hub.repo(repo).find("main")
            assert commit is not None
            for name, file in commit.files.items():
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                (place / name).write_bytes(file.data[:])
            assert "README.md" in commit.files
            verify(Folder(place), keys.trusted("ours"))
            said = json.loads((place / "continual.json").read_text())
            assert str(tmp_path) not in json.dumps(said)
            assert len(said["crc"]) == 8


def test_the_gate_takes_what_is_signed_from_folders_and_from_the_hub_and_nothing_else(
    tmp_path: Path, keys: Keys
) -> None:
    sign = signer.Signer(Settings.model_validate({"signing": {"key": keys.pem["theirs"]}}).signing)
    gate = {"signature": {"act": "refuse", "keys": [str(keys.public["theirs"])]}}
    with serving() as hub:
        base = hubs.made(tmp_path, hub)
        places = [models.fine_tune(base, tmp_path / name, seed) for seed, name in enumerate(("a", "b", "c", "d"))]
        for place in (places[0], places[2]):
            sign.sign(place, place.name)
        hubs.publish(hub, "org/signed", places[2])
        hub.commit("org/signed", {"README.md": None, ".gitattributes": b"x"})
        hubs.publish(hub, "org/unsigned", places[3])
        hub.commit("org/signed", {"extra.json": b"{}"}, branch="main")
        hub.tag("org/signed", "more")
        hub.commit("org/signed", {"extra.json": None})
        with hubs.merge(tmp_path / "state", hub, gates=gate) as merge:
            assert merge.fold(places[0]).fate == "folded"
            refused = merge.fold(places[1])
            assert (refused.fate, refused.reason) == ("refused", "signature")
            assert "has no signature (model.sig); gates.signature.act = off" in refused.message
            assert merge.fold("hf://org/signed@more").reason == "signature"
            assert merge.fold("hf://org/unsigned").reason == "signature"
            assert merge.fold("hf://org/signed").fate == "folded"
        with hubs.merge(tmp_path / "state", hub) as merge:
            assert merge.fold(places[1]).fate == "folded", "another setting: it is looked at again"


def test_what_is_exchanged_around_the_gate_is_not_folded(
    tmp_path: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever publishes into a watched folder shows the gate what was signed, and the fold something else."""
    from continual.gates import signature as gate

    sign = signer.Signer(Settings.model_validate({"signing": {"key": keys.pem["theirs"]}}).signing)
    base = models.base(tmp_path / "base")
    making.init(base, tmp_path / "state")
    weights = models.fine_tune(base, tmp_path / "in/weights", 1)
    config = models.fine_tune(base, tmp_path / "in/config", 2)
    signed = (config / "config.json").read_bytes()
    for place in (weights, config):
        sign.sign(place, place.name)
    evil = json.dumps(json.loads(signed) | {"tie_word_embeddings": True, "evil": 1}).encode()
    asked = {"signature": {"act": "refuse", "keys": [str(keys.public["theirs"])]}}
    wanted = Settings.model_validate({"state": tmp_path / "state", "gates": asked})

    def rewritten(place: Place, trusted: Trusted) -> object:
        found, file = verify(place, trusted), weights / "model.safetensors"
        times = file.stat()
        altered(weights)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        return found

    def shown(place: Place, trusted: Trusted) -> object:
        (config / "config.json").write_bytes(signed)
        return verify(place, trusted)

    with api.Merge(wanted, write=True) as merge:
        monkeypatch.setattr(gate, "verify", rewritten)
        with pytest.raises(Retry, match=r"model\.safetensors"):
            merge.engine.fold(Folder(weights, tmp_path / "in"))
        monkeypatch.setattr(gate, "verify", shown)
        (config / "config.json").write_bytes(evil)
        assert merge.engine.fold(Folder(config, tmp_path / "in")).reason == "signature"
        monkeypatch.undo()
        assert merge.state.ledger.folds() == []
