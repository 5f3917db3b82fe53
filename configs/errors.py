"""The one error type for what a user can cause, and what a disk can refuse."""

import errno

_REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES}


class UserError(ValueError):
    """Bad input. The message states the value, the rule and the remedy.

    The command line prints the message alone, without a traceback, and exits with
    status 2. Anything else that escapes is a defect of ours and keeps its traceback.
    """


class Changed(UserError):
    """What is there is not what a run was made with: its recipe, its data, or a checkpoint."""


def reason_of(error: BaseException) -> str:
    """The reason in an error, never empty, without its number or the file's name once more."""
    reason = error.strerror if isinstance(error, OSError) else str(error).strip()
    return reason or str(error).strip() or type(error).__name__


def is_refused(error: OSError) -> bool:
    """Whether a disk was full, or a file was not to be written: space or rights mend it."""
    return error.errno in _REFUSALS
