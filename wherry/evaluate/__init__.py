"""Measures: how good, how far from the original, how fast; and the proof that an artifact is what its plan says."""
