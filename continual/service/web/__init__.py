"""The daemon's one port: status page, JSON, metrics and probes."""

from continual.service.web.app import create_app, listen, parse, serve
from continual.service.web.view import Status, View
from continual.service.web.webhook import Webhook

__all__ = ["Status", "View", "Webhook", "create_app", "listen", "parse", "serve"]
