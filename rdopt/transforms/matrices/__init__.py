"""Orthogonal and other invertible matrices, one construction a file.

A new fixed basis is a word of `transforms.bases.BASES`, a new way to learn a rotation a branch of `rotations`, a new
kind of record a row of `transforms.records`.
"""
