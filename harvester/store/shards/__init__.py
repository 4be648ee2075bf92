"""Write, read, compact and rewrite immutable Parquet shards."""
