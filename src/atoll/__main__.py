"""`python -m atoll` is the `atoll` program; what `torchrun -m atoll` starts."""

from atoll.cli.main import main

main()
