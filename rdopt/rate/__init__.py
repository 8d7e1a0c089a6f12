"""Room `rate`: what a weight costs in bits, relaxed, analytic and at the limit, and the error that buys.

A new density is a row of `densities.DENSITIES`.
"""
