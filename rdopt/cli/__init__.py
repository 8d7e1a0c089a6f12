"""Room `cli`: thin commands; each parses, calls one function and prints."""
