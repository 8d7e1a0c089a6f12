"""Orthogonal and other invertible matrices, one construction a file."""
