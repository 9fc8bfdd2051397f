"""The Hugging Face Hub as a place where models are: asking it, and reading tensors of a repo by ranges. No candidate is
judged and no time kept here."""

from continual.hub.client import Hub, Info, RemoteFile, Trouble, must_be_online
from continual.hub.names import named
from continual.hub.repo import Repo

__all__ = ["Hub", "Info", "RemoteFile", "Repo", "Trouble", "must_be_online", "named"]
