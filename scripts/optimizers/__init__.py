"""What other coordinates save of a model trained by one optimizer or another."""
