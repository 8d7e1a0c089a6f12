"""Grids: what a real coordinate, in units of its step, is rounded to, and what an index decodes to.

`rdopt/rate/grids.py` lists them all and says what a new one needs.
"""
