"""Recognise the errors that torch raises when memory runs out."""

from __future__ import annotations

import torch

# What torch's CPU allocator says when memory runs out: on Linux, and elsewhere.
HOST_MEMORY_ERRORS = ("can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device or the host has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in HOST_MEMORY_ERRORS)
