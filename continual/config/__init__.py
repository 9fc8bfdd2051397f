"""Everything a user can set: one frozen `Settings`, and where it comes from."""

from continual.config.canary import CanarySettings
from continual.config.cluster import RaySettings
from continual.config.given import load, settings_of
from continual.config.notify import NotifySettings
from continual.config.round_settings import CalibrationSettings, RoundSettings, StepSettings
from continual.config.settings import (
    HookSettings,
    HubSettings,
    ReleaseSettings,
    Settings,
    ViewSettings,
)
from continual.config.signing import SigningSettings
from continual.config.values import parse_bytes

__all__ = [
    "CalibrationSettings",
    "CanarySettings",
    "HookSettings",
    "HubSettings",
    "NotifySettings",
    "RaySettings",
    "ReleaseSettings",
    "RoundSettings",
    "Settings",
    "SigningSettings",
    "StepSettings",
    "ViewSettings",
    "load",
    "parse_bytes",
    "settings_of",
]
