"""The error that the command line reports in one line, with exit status 2."""


class InputError(ValueError):
    """Report an unusable argument, file or checkpoint.

    The message is one line: it names the argument, what was given and what is accepted.
    """
