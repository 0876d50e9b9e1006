"""Printing of what came from file names, in which characters occur that a terminal or a pipe cannot take."""

import io
import sys


def escape_unprintable() -> None:
    """Let stdout print such characters as \\xe9, like stderr, instead of ending the program with an error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
