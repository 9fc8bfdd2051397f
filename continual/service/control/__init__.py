"""Control of a running daemon: what can be asked of it, how that is done to an open state, and the socket between the
command and the daemon. Decision 0028 says why it is like this."""
