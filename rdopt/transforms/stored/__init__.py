"""Rotations that no symmetry absorbs: the file keeps them and the decoder undoes them."""
