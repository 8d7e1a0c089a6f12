"""Entropy coders: integers to bytes and back, the same on every machine."""
