"""The exception for mistakes that the user can fix."""


class UserError(Exception):
    """A mistake in the input: a flag, a path, a file, a data set.

    The message says what was found, what was expected and what to do. The command line prints it without a traceback
    and exits with code 2; tracebacks are for bugs of this project.
    """
