"""Let an operator talk to a running harvest over a Unix socket."""
