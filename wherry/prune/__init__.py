"""Pruning: zeros in weights (magnitude, wanda, sparsegpt), and smaller shapes. One method a file."""
