"""Float networks to integer networks: statistics, ranges, repairs, precision, and the file that comes out."""
