"""The errors that the project tells apart: mistakes of the person at the keyboard, and numbers gone astray."""


class UserError(ValueError):
    """A mistake the user can mend: the message names what was wrong, with which value, and what to do.

    The command line prints it as one line and exits with code 2; everything else is a bug and keeps its traceback.
    """


class NotFiniteError(ValueError):
    """NaN or infinity where a number was needed; in training, the sign of a divergence."""
