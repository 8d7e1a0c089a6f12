"""The exact symmetries of the network, which cost no bits, one a file. `registry.SITES` lists them: add one there."""
