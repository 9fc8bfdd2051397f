"""`python -m tests.campaigns.faults.steps`."""

from tests.campaigns.faults.steps.campaign import main

main()
