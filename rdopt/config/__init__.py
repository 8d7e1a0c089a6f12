"""Room 1, config: what a run is told, as frozen dataclasses, and the refusals a user can read."""
