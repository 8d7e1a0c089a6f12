"""rdopt: learn the coordinates in which a language model compresses best, then code it into a file."""

__version__ = "0.1.0"
