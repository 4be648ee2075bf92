"""Fine-tune a local student on a harvested corpus with LoRA, evaluate it, and publish it with its papers.

This file imports nothing: import a name from the module that defines it.
"""
