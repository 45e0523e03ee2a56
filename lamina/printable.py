"""Every string that came from somewhere else is shown through one function: it can neither steer a terminal nor fill one.

Somewhere else is another machine (a message's `detail`, a device's `failure`, a header), but also a file of somebody else's: a
name in a manifest, a label in a table, a tensor's name. It costs nothing to import.
"""

USUAL_CHARACTERS = 200
_REPLACEMENT = "\ufffd"


def printable(text: str, most: int = USUAL_CHARACTERS, *, keeps_lines: bool = False) -> str:
    """`text` as one line of at most `most` characters that a terminal, a log and a page show as they are.

    White space of any kind becomes a space; control characters, escape sequences, marks that turn the direction of writing,
    invisible and unassigned characters become U+FFFD. What is cut ends with `...`. The cost grows with `most`, not with the
    text. With `keeps_lines`, line feeds stay: for a text of several lines that is shown as a block of its own.
    """
    if most < 3:
        raise ValueError(f"most is {most}; three characters are needed for the mark of what was cut")
    cut = text[: most - 3] + "..." if len(text) > most else text
    if cut.isascii() and cut.isprintable():
        return cut
    return "".join(_shown(character, keeps_lines) for character in cut)


def printable_markup(text: str, most: int = USUAL_CHARACTERS) -> str:
    """`printable`, for where rich reads its markup: `[/x]` is shown as it stands and closes nothing."""
    from rich.markup import escape

    return escape(printable(text, most))


def _shown(character: str, keeps_lines: bool) -> str:
    if character.isprintable() or (character == "\n" and keeps_lines):
        return character
    return " " if character.isspace() else _REPLACEMENT
