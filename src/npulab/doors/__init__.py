"""Doors: what a vendor's own converter takes, the script that calls it, and the tool run where it is installed."""
