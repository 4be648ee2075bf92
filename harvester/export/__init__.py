"""Turn a corpus into what others read: curated shards, other formats, cards."""
