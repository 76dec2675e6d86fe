"""The error that the command line turns into one line and exit status 2."""


class InputError(ValueError):
    """Report an argument, a file or a checkpoint that cannot be used.

    The message is one line: it names the argument, what was given and what is accepted.
    """
