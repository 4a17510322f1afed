"""`python -m fedsim` is `fedsim`."""

from fedsim.cli import main

main()
