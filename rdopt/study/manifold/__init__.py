"""Whether training moves the weights along few directions, and what noise along and across them does."""
