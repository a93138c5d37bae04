"""Methods that choose codes for weights: one file each, named as in its paper."""
