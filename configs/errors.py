"""The one error type for what a user can cause."""


class UserError(ValueError):
    """Bad input. The message states the value, the rule and the remedy.

    The command line prints the message alone, without a traceback, and exits with
    status 2. Anything else that escapes is a defect of ours and keeps its traceback.
    """
