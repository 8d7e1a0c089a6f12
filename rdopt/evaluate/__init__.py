"""Room evaluate: perplexity and KL divergence of a candidate against its original, with their errors.

A new figure is a file here, called in `measure` and named in `eval_figures` of `encode/measure.py`.
"""
