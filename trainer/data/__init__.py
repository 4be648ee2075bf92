"""Turn a corpus into batches: load, render with the chat template, pack, order, collate."""
