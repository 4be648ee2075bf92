"""Distil on-policy: the student answers, the teacher scores its tokens, the student learns from that."""
