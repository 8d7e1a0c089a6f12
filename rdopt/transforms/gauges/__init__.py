"""The exact symmetries of the network, which cost no bits."""
