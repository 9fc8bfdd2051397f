"""The proof that a model was taken out of a merge: the statement about it, and the script that checks that."""

from continual.removal.certificate import certified, check_certifiable, check_place, sources_shown

__all__ = ["certified", "check_certifiable", "check_place", "sources_shown"]
