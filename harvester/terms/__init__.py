"""Decide whether a teacher's recorded terms permit training on its outputs."""
