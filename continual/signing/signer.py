"""Signing what goes out: an export, or a release, with its `continual.json` in it, so that what that says is signed,
too."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from continual.config import SigningSettings
from continual.errors import Misconfigured, Retry
from continual.signing.manifests import SIGNATURE, ModelFiles, files_of
from continual.signing.trust import must_be_installed
from continual.tensors.checkpoints.place import Folder

if TYPE_CHECKING:
    from model_signing import signing


class Signer:
    """Signs directories as the settings say."""

    def __init__(self, settings: SigningSettings) -> None:
        self._settings = settings

    def sign(self, directory: Path, name: str) -> None:
        """Writes the signature of all that is in `directory` into it, in place of one that is there; `name`: what the
        model is called. Raises Misconfigured for a key that cannot be used, Retry where Sigstore cannot be reached."""
        signature = directory / SIGNATURE
        signature.unlink(missing_ok=True)
        files = files_of(Folder(directory), name)
        config = _config(self._settings)
        config.set_hashing_config(_Hashing(files))
        try:
            config.sign(str(directory), str(signature))
        except Exception as error:  # of many libraries
            said = f"{str(error) or type(error).__name__}; nothing was written"
            if self._settings.sigstore:
                raise Retry(f"signing {name} by Sigstore: {said}") from None
            raise Misconfigured(f"signing {name}: {said}") from None


class _Hashing:
    """Stands where the library would hash a directory."""

    def __init__(self, files: ModelFiles) -> None:
        self._files = files

    def hash(self, _model: object) -> ModelFiles:
        """The files as they are."""
        return self._files


def check(settings: SigningSettings) -> None:
    """Raises Misconfigured for settings by which nothing can be signed: two ways at once, a file that is not there or
    no key, or the extra is not installed."""
    if not is_asked(settings):
        return
    if settings.sigstore and settings.key is not None:
        raise Misconfigured("signing.sigstore and signing.key: one of them signs; leave the other out")
    if settings.key is None and (settings.certificate is not None or settings.chain):
        raise Misconfigured("signing.certificate: the private key of it is not named: set signing.key")
    if settings.chain and settings.certificate is None:
        raise Misconfigured("signing.chain: the certificate that it is of is not named: set signing.certificate")
    for file in (settings.key, settings.certificate, *settings.chain):
        if file is not None and not file.is_file():
            raise Misconfigured(f"signing: {file}: no such file")
    must_be_installed("signing")
    _config(settings)


def is_asked(settings: SigningSettings) -> bool:
    """Whether anything is to be signed."""
    return settings.sigstore or bool(settings.key or settings.certificate or settings.chain)


def _config(settings: SigningSettings) -> signing.Config:
    """The library's signer. Raises Misconfigured for a file that is no key."""
    must_be_installed("signing")
    from model_signing import signing

    try:
        if settings.sigstore:
            return signing.Config().use_sigstore_signer(use_ambient_credentials=True)
        assert settings.key is not None
        if settings.certificate is None:
            return signing.Config().use_elliptic_key_signer(private_key=settings.key)
        return signing.Config().use_certificate_signer(
            private_key=settings.key, signing_certificate=settings.certificate, certificate_chain=settings.chain
        )
    except (OSError, ValueError, TypeError) as error:
        raise Misconfigured(f"signing.key = {settings.key}: cannot be used ({error})") from None
