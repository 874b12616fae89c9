"""The one exception that means: the user can fix this."""


class UserError(Exception):
    """A mistake in what the user gave: a flag, a path, a file, a data set.

    Its message is one sentence that says what was found, what was expected and what to do. The command line
    prints that sentence alone and exits with code 2; a traceback is kept for our own bugs.
    """
