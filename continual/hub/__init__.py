"""The Hugging Face Hub: asks it what there is, and reads the tensors of a repo by ranges. No candidate is judged here,
and no schedule is kept."""

from continual.hub.answers import Info, RemoteFile
from continual.hub.client import Hub, must_be_online
from continual.hub.names import named
from continual.hub.repo import Repo
from continual.hub.trouble import Trouble

__all__ = ["Hub", "Info", "RemoteFile", "Repo", "Trouble", "must_be_online", "named"]
