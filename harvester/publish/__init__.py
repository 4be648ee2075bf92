"""Publish a store: what is published of it, the terms, the mirror of a run, and the Hugging Face Hub."""
