"""Other methods, at their published settings, with real bytes: what a comparison measures rdopt against."""
