"""Compute a student's forward over packed rows: attention, LoRA layers, output layer, losses."""
