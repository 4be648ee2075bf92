"""Maintain a store: seal, repair, purge, quarantine."""
