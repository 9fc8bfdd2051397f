"""Whether a model has a valid signature of somebody who is trusted."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from continual.errors import Misconfigured, Refuse
from continual.outside import shown
from continual.signing.manifests import SIGNATURE, ModelFiles, files_of
from continual.tensors.checkpoints.place import Folder, Place

if TYPE_CHECKING:
    from model_signing import verifying

_LONGEST = 600


@dataclass(frozen=True, slots=True)
class Trusted:
    """Who is trusted: `keys`, files with a public key each (PEM, of an elliptic curve); `certificates`, files with the
    roots to which the certificate of a signer has to lead; or an `identity` that signs by Sigstore, and who vouches for
    it (`issuer`)."""

    keys: Sequence[str] = ()
    certificates: Sequence[str] = ()
    identity: str = ""
    issuer: str = ""

    def check(self, where: str) -> None:
        """Raises Misconfigured, naming `where` it was set, where nobody is trusted, a file is not there, or the extra
        is not installed."""
        if not (self.keys or self.certificates or self.identity):
            raise Misconfigured(f"{where}: nobody is trusted: name keys, certificates, or an identity with its issuer")
        if bool(self.identity) != bool(self.issuer):
            raise Misconfigured(f"{where}: an identity and its issuer go together")
        for file in (*self.keys, *self.certificates):
            if not Path(file).is_file():
                raise Misconfigured(f"{where}: {file}: no such file")
        must_be_installed(where)


class SignedBy(NamedTuple):
    """By whom a model is signed, in words, and how many files the signature covers."""

    by: str
    files: int


def must_be_installed(what: str) -> None:
    """Raises Misconfigured where the extra is not installed."""
    if find_spec("model_signing") is None:
        raise Misconfigured(f"{what}: signatures need a package that is not there: pip install 'continual[signing]'")


def verify(place: Place, trusted: Trusted) -> SignedBy:
    """Checks the signature of the model at `place`: the files that are there, all of them, have the hashes that
    somebody who is trusted has signed. Raises Refuse (`signature`) where that is not so, Retry where a file cannot be
    read now, Misconfigured for who cannot be trusted."""
    if not place.present(SIGNATURE):
        raise Refuse("signature", f"{place}: has no signature ({SIGNATURE})")
    signature, files = place.small(SIGNATURE), files_of(place)
    said = ""
    for by, config in _verifiers(trusted):
        config.set_hashing_config(_Hashed(files))
        with tempfile.NamedTemporaryFile(prefix="continual-signature-") as copy:
            copy.write(signature)
            copy.flush()
            try:
                config.verify(str(place), copy.name)
            except Exception as error:  # of many libraries, at bytes of strangers
                said = said or f"not of {by}: {shown(str(error) or type(error).__name__)}"
            else:
                return SignedBy(by, len(files.files))
    raise Refuse("signature", f"{place}: its signature is {said}"[:_LONGEST])


def verify_directory(directory: Path, trusted: Trusted) -> SignedBy:
    """The same of the model in a directory. Raises as `verify`, and Misconfigured where there is no such directory."""
    if not directory.is_dir():
        raise Misconfigured(f"{directory}: no such directory")
    return verify(Folder(directory), trusted)


class _Hashed:
    """Stands where the library would hash a directory."""

    def __init__(self, files: ModelFiles) -> None:
        self._files = files

    def hash(self, _model: object, *, files_to_hash: object = None) -> ModelFiles:  # noqa: ARG002
        """The files as they are."""
        return self._files

    def add_ignored_paths(self, *, model_path: object, paths: object) -> None:
        """What a signer leaves out is not left out here: a file that is read has to be signed."""


def _verifiers(trusted: Trusted) -> list[tuple[str, verifying.Config]]:
    """What asks for each of those who are trusted. Raises Misconfigured for a file that is no key."""
    from model_signing import verifying

    found = []
    for key in trusted.keys:
        try:
            found.append((f"the key {key}", verifying.Config().use_elliptic_key_verifier(public_key=key)))
        except (OSError, ValueError) as error:
            raise Misconfigured(f"{key}: is no public key of an elliptic curve in PEM ({error})") from None
    if trusted.certificates:
        chain = [Path(file) for file in trusted.certificates]
        try:
            config = verifying.Config().use_certificate_verifier(certificate_chain=chain)
        except (OSError, ValueError) as error:
            raise Misconfigured(f"{', '.join(trusted.certificates)}: no certificates in PEM ({error})") from None
        found.append((f"a certificate below {', '.join(trusted.certificates)}", config))
    if trusted.identity:
        config = verifying.Config().use_sigstore_verifier(identity=trusted.identity, oidc_issuer=trusted.issuer)
        found.append((f"{trusted.identity} ({trusted.issuer})", config))
    return found
