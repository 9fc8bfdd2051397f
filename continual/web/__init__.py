"""The daemon's one port: status page, JSON, metrics and probes."""

from continual.web.app import create_app, listen, parse, serve
from continual.web.view import Status, View
from continual.web.webhook import Webhook

__all__ = ["Status", "View", "Webhook", "create_app", "listen", "parse", "serve"]
