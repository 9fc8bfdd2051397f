"""A Hugging Face Hub on loopback for the real client: `with serving(Hub()) as hub: HfApi(endpoint=hub.endpoint,
token=TOKEN)`.

It keeps models in memory (`repos`, `hub`, `access`), speaks the wire protocol (`listing`, `writing`, `files`, `xet`),
writes down every request (`journal`), fails as told (`faults`) and sends webhooks (`webhooks`). Pull requests
are opened, listed, merged and closed (`discussions`). Datasets, Spaces and other discussions are not here.
"""

from tests.loopback.access import TOKEN, Account
from tests.loopback.client import environment, online
from tests.loopback.hub import Hub
from tests.loopback.journal import Journal, Request
from tests.loopback.serving import serving
from tests.loopback.webhooks import Change, Deliveries

__all__ = ["TOKEN", "Account", "Change", "Deliveries", "Hub", "Journal", "Request", "environment", "online", "serving"]
