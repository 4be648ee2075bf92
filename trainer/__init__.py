"""Fine-tunes a local student on a harvested corpus with LoRA, scores it, exports it with its papers.

Import from the room that owns the name; this file imports nothing.
"""

__version__ = "0.1.0"
