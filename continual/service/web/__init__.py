"""The daemon's one port: status page, JSON, metrics and probes."""

from continual.service.web.app import create_app, listen, serve
from continual.service.web.commanding import Commanding
from continual.service.web.seen import View
from continual.service.web.server import Ears
from continual.service.web.view import Status

__all__ = ["Commanding", "Ears", "Status", "View", "create_app", "listen", "serve"]
