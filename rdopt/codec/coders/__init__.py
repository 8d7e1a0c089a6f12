"""Entropy coders, the same bytes on every machine. `registry.CODERS` lists those of trellis indices: add one there."""
