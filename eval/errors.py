"""The one error that speaks to the user."""


class UserError(Exception):
    """The user's input is wrong: one line that says what, where, and what would be right.

    The command line prints it on stderr and exits with code 2, without a traceback.
    """


class WorkError(Exception):
    """The work itself failed (no disk space, a diverged training): one line; nothing finished is lost.

    The command line prints it on stderr and exits with code 1, without a traceback.
    """
