"""The transforms compared with each other: arms and plots."""
