"""Divide limits: among the addresses of a teacher, and among the harvests of a machine."""
