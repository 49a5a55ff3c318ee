"""Sweeps: every point of a grid of models, targets, plans, options and what-ifs, profiled; the results in one file."""
