"""Checkpoints of other projects, one project a file."""
