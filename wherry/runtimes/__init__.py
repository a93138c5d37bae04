"""What runs an artifact: each loads it and gives a Session."""
