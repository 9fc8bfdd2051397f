"""The files of a model with their SHA-256, in the form in which `model-signing` takes them.

The library would hash a directory by itself. It is done here, since a repo of the Hub is no directory, since nothing
but regular files may be opened, and so that a signature names the model as its directory is called in the end. What is
used of the library is its public interface: a manifest is anything that has these methods.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from continual.tensors.checkpoints.place import Place

SIGNATURE = "model.sig"
"""The file that has the signature of a model, as the library's own command calls it."""
GIT = (".git", ".gitattributes", ".github", ".gitignore")
"""What the library leaves out, besides the signature."""
_CACHE = ".cache"
"""Where the Hub's client keeps what it knows of a directory that it has fetched."""


@dataclass(frozen=True, slots=True)
class FileHash:
    """A hash as the library asks for it."""

    algorithm: str
    digest_hex: str

    @property
    def digest_value(self) -> bytes:
        """The bytes of it."""
        return bytes.fromhex(self.digest_hex)


@dataclass(frozen=True, slots=True)
class SignedFile:
    """A file of a model: its path in it, and its hash."""

    identifier: str
    digest: FileHash


@dataclass(frozen=True, slots=True, eq=False)
class ModelFiles:
    """All files of a model, `files` from their paths to the SHA-256 in hexadecimal, and what the model is called."""

    model_name: str
    files: Mapping[str, str]

    def resource_descriptors(self) -> Iterator[SignedFile]:
        """Each file, in order."""
        for name in sorted(self.files):
            yield SignedFile(name, FileHash("sha256", self.files[name]))

    @property
    def serialization_type(self) -> dict[str, object]:
        """How the files were hashed, as the library writes it down."""
        ignored = [SIGNATURE, *GIT]
        return {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": ignored}

    def __eq__(self, other: object) -> bool:
        """Whether a manifest of the library has the same files with the same hashes."""
        descriptors = getattr(other, "resource_descriptors", None)
        if descriptors is None:
            return NotImplemented
        theirs = {one.identifier: (one.digest.algorithm, one.digest.digest_hex) for one in descriptors()}
        return theirs == {name: ("sha256", digest) for name, digest in self.files.items()}

    __hash__ = None  # type: ignore[assignment]


def files_of(place: Place, name: str | None = None) -> ModelFiles:
    """The files of a model as they are, without its signature and what belongs to git. `name`: what it is called.
    Raises Refuse and Retry where one cannot be read, or no hash of it is known."""
    found = sorted(file for file in place.files() if not _is_left_out(file))
    return ModelFiles(name or place.name, {file: place.sha256(file) for file in found})


def _is_left_out(file: str) -> bool:
    first = file.partition("/")[0]
    return file == SIGNATURE or first in (*GIT, _CACHE)
