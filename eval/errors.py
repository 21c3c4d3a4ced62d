"""The errors that speak to the user, and what others have to say."""

from collections.abc import Iterator

_UNREACHABLE = {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "TransportError", "ConnectionError"}


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


def why_no_hub(error: BaseException) -> str:
    """Why the Hub gave nothing, and what would help."""
    causes = list(_causes(error))
    kinds = {kind.__name__ for cause in causes for kind in type(cause).__mro__}
    if kinds & _UNREACHABLE or any("client has been closed" in str(cause) for cause in causes):
        offline = "OfflineModeIsEnabled" in kinds
        return f"the Hub cannot be reached: {'unset HF_HUB_OFFLINE' if offline else 'connect to the network'}"
    if "GatedRepoError" in kinds:
        return "the Hub gives it only to those who asked: accept its terms there and set HF_TOKEN"
    if "RevisionNotFoundError" in kinds:
        return "the Hub has no such revision of it: give another"
    if kinds & {"RepositoryNotFoundError", "HFValidationError", "DatasetNotFoundError"}:
        return "the Hub has none of that name: check it, or set HF_TOKEN if it is private"
    return f"the Hub gave none: {reason(error)}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came of."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
