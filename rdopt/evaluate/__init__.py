"""Room evaluate: perplexity and KL divergence of a candidate against its original, with their errors."""
