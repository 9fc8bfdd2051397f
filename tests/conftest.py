"""Settings of the test run that are not pytest's own."""

from __future__ import annotations

from hypothesis import settings

# An example may take as long as it takes: on a busy machine hypothesis' 200 ms say nothing about the code
settings.register_profile("untimed", settings.get_profile(settings.get_current_profile_name()), deadline=None)
settings.load_profile("untimed")
