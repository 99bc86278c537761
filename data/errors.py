"""Errors of the data room, written for the person who has to mend them."""


class DataError(ValueError):
    """Something about the data the user can mend: the message names what was wrong, with which value, and what to do.

    The command line prints it as one line and exits with code 2.
    """


class BadImage(DataError):
    """One image that cannot be used: unreadable, truncated or smaller than the crop; packing skips and names it."""
