"""`python -m medm`, the form that `torchrun -m medm` and `deepspeed --module medm` start."""

from medm.cli import main

main()
