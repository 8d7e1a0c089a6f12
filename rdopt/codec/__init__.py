"""Room `codec`: grids, feedback, entropy coding and the container; a model to a file and back."""
