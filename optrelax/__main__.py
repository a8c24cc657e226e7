"""`python -m optrelax`: the command line."""

from optrelax.cli import main

main()
