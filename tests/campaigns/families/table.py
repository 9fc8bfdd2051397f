"""All families of the campaign."""

from __future__ import annotations

from tests.campaigns.families.decoders import TEXT
from tests.campaigns.families.family import Family
from tests.campaigns.families.readers import PAIRS, READERS
from tests.campaigns.families.seers import MIXED, PAINTERS, SEERS

TABLE: tuple[Family, ...] = TEXT + PAIRS + READERS + SEERS + MIXED + PAINTERS
