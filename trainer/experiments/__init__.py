"""Repeat trainings to decide what to pay for next: the cost curve, and the loop on hard prompts."""
