"""`python -m decodelab` is the command `decodelab`."""

from decodelab.cli import app

app(prog_name="decodelab")
