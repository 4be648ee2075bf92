"""Show a store to people and monitors: the HTML report, the live view, Prometheus text."""
