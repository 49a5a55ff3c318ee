"""Graphs to Graphs: the same network, or a part of it, at another size."""
