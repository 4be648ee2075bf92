"""Keep answers: the journal, sealed shards, and everything that reads or repairs them."""
