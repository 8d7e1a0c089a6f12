"""Room `align`: learns the gauges of a model on J = R + lam D, with resume, on all devices of all processes."""
