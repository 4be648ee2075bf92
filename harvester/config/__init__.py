"""Read `harvest.toml` into frozen values."""
