"""Probability tables of indices: classes of entries, and tables derived from a few numbers or written out."""
