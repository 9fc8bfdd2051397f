"""`python -m tests.campaigns.faults.steps`."""

import os

for name in [name for name in os.environ if name.startswith("HF_")]:
    del os.environ[name]
os.environ |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
# the client of xet has threads of its own, which no fork takes along; the environment counts as the client is imported

from tests.campaigns.faults.steps.campaign import main  # noqa: E402

main()
