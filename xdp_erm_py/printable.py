"""Text of others on its way to a terminal, a log or a metric. Linux allows escape sequences in interface names."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""The text with \x1b and the like in place of what would do something other than be seen.

    Control characters, line ends, what turns the direction of writing, and what was no UTF-8.
    """
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def say(line: str) -> None:
    """Prints a line for people, at once."""
    print(printable(line), flush=True)
