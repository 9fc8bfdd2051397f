"""`python -m tests.loopback [--port P] [--cdn-port P]`: an empty Hub for people to try the client on, until Ctrl+C."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys

from tests.loopback import TOKEN, serving


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.loopback", description="Serves an empty Hub on loopback.")
    parser.add_argument("--port", type=int, default=0, help="port of the API (a free one)")
    parser.add_argument("--cdn-port", type=int, default=0, help="port of the CDN (a free one)")
    options = parser.parse_args()
    with serving(port=options.port, cdn_port=options.cdn_port) as hub:
        sys.stdout.write(f"HF_ENDPOINT={hub.endpoint} HF_TOKEN={TOKEN}\n")
        sys.stdout.flush()
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
