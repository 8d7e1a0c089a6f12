"""Room `sweep`: files at many slopes, curves, Pareto fronts, gains at equal KL, plots."""
