"""Room `integrations`: compressed files in other tools: transformers' torch models, model cards."""

from rdopt.integrations.model_card import decoded_card, model_card
from rdopt.integrations.transformers_loader import load_compressed

__all__ = ["decoded_card", "load_compressed", "model_card"]
