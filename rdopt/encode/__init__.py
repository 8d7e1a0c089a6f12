"""Room `encode`: from a model in its coordinates to a file."""
