"""Prove where a student came from: terms check, hash tree, model card."""
