"""Weights as smooth or low-rank functions of their index."""
