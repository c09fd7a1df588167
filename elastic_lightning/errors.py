"""Exceptions that are the user's to mend."""


class UserError(ValueError):
    """Wrong input, said in one line that names what to change.

    The command line prints the message without a traceback and exits with status 1; in Python it is a `ValueError`.
    """


class UsageError(UserError):
    """A command line that cannot be parsed; it exits with status 2."""


class NotFinite(UserError):
    """A batch holds NaN or an infinite number; who trains may skip it. `what`: the reward, the loss or the gradient."""

    def __init__(self, what: str, message: str) -> None:
        super().__init__(message)
        self.what = what
