"""Room `integrations`: compressed files in other tools: transformers' torch models, model cards."""
