"""What programs, the commands and the daemon work with: an open merge, and what looks after the files of a state."""

from continual.api.caretaking import Verified, backup, look_repair, repair, verify
from continual.api.merge import Merge, open

__all__ = ["Merge", "Verified", "backup", "look_repair", "open", "repair", "verify"]
