"""The one kind of error that is meant for the person at the keyboard."""


class UserError(ValueError):
    """A mistake the user can mend: the message names what was wrong, with which value, and what to do.

    The command line prints it as one line and exits with code 2; everything else is a bug and keeps its traceback.
    """
