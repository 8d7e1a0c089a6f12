"""Room `runs`: what a run folder is: configuration, moments, states, export and the way back."""
