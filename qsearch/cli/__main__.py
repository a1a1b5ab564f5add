"""`python -m qsearch.cli`: the command without its script."""

from . import main

main()
