"""Room operator: the Llama family in JAX, one block or the whole model, with a hook at every matrix."""
