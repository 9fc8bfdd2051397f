"""`python -m tests.faults.hub`."""

from tests.faults.hub.campaign import main

main()
