"""Chaos on the Hub: `python -m tests.faults.hub`; what it does stands in campaign.py."""

from tests.faults.hub.campaign import campaign
from tests.faults.hub.evidence import secrets
from tests.faults.hub.lives import READER

__all__ = ["READER", "campaign", "secrets"]
