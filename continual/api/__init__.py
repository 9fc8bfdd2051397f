"""What programs, the commands and the daemon work with: an open merge, and what looks after the files of a state."""

from typing import TYPE_CHECKING

from continual.lazily import from_homes

if TYPE_CHECKING:
    from continual.api.caretaking import Verified, backup, look_repair, repair, verify
    from continual.api.merge import Merge, open

__all__ = ["Merge", "Verified", "backup", "look_repair", "open", "repair", "verify"]

if not TYPE_CHECKING:  # else a checker would take any name for one of ours
    __getattr__ = from_homes(
        __name__,
        {
            "caretaking": ("Verified", "backup", "look_repair", "repair", "verify"),
            "merge": ("Merge", "open"),
        },
    )
