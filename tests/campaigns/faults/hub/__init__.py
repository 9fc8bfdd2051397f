"""Chaos on the Hub: `python -m tests.campaigns.faults.hub`; what it does stands in campaign.py."""

from tests.campaigns.faults.hub.campaign import campaign
from tests.campaigns.faults.hub.evidence import secrets
from tests.campaigns.faults.hub.lives import READER

__all__ = ["READER", "campaign", "secrets"]
