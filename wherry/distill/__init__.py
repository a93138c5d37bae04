"""Losses, students and adapters: steps of a training recipe, one per file."""
