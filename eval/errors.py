"""The one error that speaks to the user."""


class UserError(Exception):
    """The user's input is wrong: one line that says what, where, and what would be right.

    The command line prints it on stderr and exits with code 2, without a traceback.
    """
