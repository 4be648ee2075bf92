"""Load a student and define its forward: LoRA, attention over packed rows, losses."""
