"""``python -m fot``."""

from fot.cli import program

program()
