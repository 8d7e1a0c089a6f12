"""Rotations that no symmetry absorbs: the file keeps them and the decoder undoes them.

`rotations.STRUCTURES` lists their structures: add one there.
"""
