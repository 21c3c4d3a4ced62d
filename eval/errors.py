"""The errors that speak to the user, and what others have to say."""


class UserError(Exception):
    """The user's input is wrong: one line that says what, where, and what would be right.

    The command line prints it on stderr and exits with code 2, without a traceback.
    """


class WorkError(Exception):
    """The work itself failed (no disk space, a diverged training): one line; nothing finished is lost.

    The command line prints it on stderr and exits with code 1, without a traceback.
    """


def reason(error: BaseException) -> str:
    """The first line of what an error says; the name of its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def shown(text: str, most: int = 200) -> str:
    """A text as messages quote it: not all of a long one."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"
