"""The exceptions that the command-line programs turn into a line instead of a traceback."""


class UserError(Exception):
    """A fault that the person at the command line can mend.

    The message is one line: what must hold, what came, and what to do about it. The programs print
    it and exit with status 2.
    """


class NoDataSetError(UserError):
    """The name of a data set is not known. A program adds its option for the data directory to the message."""


class StorageError(UserError):
    """The disk or the memory refused. The work so far is kept, and goes on when there is room."""


class Interrupted(Exception):
    """Ctrl-C or a termination signal ended the run after its state was saved; the programs exit with status 130."""


def one_line(error: BaseException) -> str:
    """Return the type of an error and what it says, without line breaks."""
    return " ".join(f"{type(error).__name__}: {error}".split())
