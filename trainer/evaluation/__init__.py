"""Judge a student: generate, score beside the teacher, check the data before training."""
