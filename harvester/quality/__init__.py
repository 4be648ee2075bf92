"""Judge texts: duplicates and near duplicates, overlap with evaluation sets, verifiers of answers."""
