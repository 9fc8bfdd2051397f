"""The daemon's one port: status page, JSON, metrics and probes."""

from typing import TYPE_CHECKING

from continual.lazily import from_homes

if TYPE_CHECKING:
    from continual.service.web.app import create_app, listen, serve
    from continual.service.web.commanding import Commanding
    from continual.service.web.seen import View
    from continual.service.web.server import Ears
    from continual.service.web.view import Status

__all__ = ["Commanding", "Ears", "Status", "View", "create_app", "listen", "serve"]

if not TYPE_CHECKING:  # else a checker would take any name for one of ours
    __getattr__ = from_homes(
        __name__,
        {
            "app": ("create_app", "listen", "serve"),
            "commanding": ("Commanding",),
            "seen": ("View",),
            "server": ("Ears",),
            "view": ("Status",),
        },
    )
