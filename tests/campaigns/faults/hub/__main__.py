"""`python -m tests.campaigns.faults.hub`."""

from tests.campaigns.faults.hub.campaign import main

main()
