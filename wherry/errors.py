"""The one tree of exceptions: every error that a user can cause or meet is a `wherry.Error`.

Each message says what happened, why, and the way out, in one to three short lines. The command line
prints the message and exits with the class's `code`; the server maps the class to an HTTP status.
"""


class Error(Exception):
    """Anything that wherry refuses or cannot do; `except wherry.Error` catches all of them."""

    code = 1


class Unsupported(Error):
    """Well formed but impossible here: says what, why, and the nearest thing that works."""

    code = 3


class BadInput(Error):
    """A malformed recipe, path, file or request; names the field or the file and line."""

    code = 2


class Missing(Error):
    """An optional package or a file is absent; carries the command or path that mends it."""

    code = 4


class Corrupt(Error):
    """A hash, a header, a shape or a value of a file is not what it must be."""

    code = 5


class Diverged(Error):
    """Numbers went wrong (NaN, not positive definite); says where and which knob to turn."""

    code = 6


class Exhausted(Error):
    """Memory, disk, queue or time ran out, or would; carries needed and available."""

    code = 7


class Refused(Error):
    """A guard said no: a key, a quota, a limit."""

    code = 8
