"""`python -m npulab` is `npulab`."""

from npulab.cli import main

main()
