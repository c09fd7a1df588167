"""The one exception that is the user's to mend."""


class UserError(ValueError):
    """Wrong input, said in one line that names what to change.

    The command line prints the message without a traceback and exits with status 1; in Python it is a `ValueError`.
    """
