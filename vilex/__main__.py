"""`python -m vilex` is the command `vilex`."""

from vilex.cli import main

main(prog_name="vilex")
