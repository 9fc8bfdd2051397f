"""All that runs over an open merge: the daemon, its outlets, the status page and the metrics."""
