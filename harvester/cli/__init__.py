"""One file a family of verbs. Each command imports its rooms when it runs, so `--help` stays light."""
