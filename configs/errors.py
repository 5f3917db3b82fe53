"""The one error type for what a user can cause."""


class UserError(ValueError):
    """Bad input. The message states the value, the rule and the remedy.

    The command line prints the message alone, without a traceback, and exits with
    status 2. Anything else that escapes is a defect of ours and keeps its traceback.
    """


class RankError(UserError):
    """One that a rank of a run meets alone: the other ranks do not know of it, so it says it."""
