"""Check the terms of a corpus, and write the documents and the hash tree of a student."""
