"""Calls to remote storage: what is worth another attempt, and what only its user can mend."""

import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from bigbatch.configs.errors import UserError

T = TypeVar("T")

_ATTEMPTS = 8
_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 20.0
# HTTP statuses that do not pass. S3 has timeouts among those of 400, and a response that is
# cut in its headers is a 400 to aiohttp.
_FINAL = {401, 402, 403, 404, 405, 407, 410, 451}
# The libraries below fsspec raise their own errors for connections, without a common base.
_NETWORK = ("aiohttp.", "botocore.", "urllib3.", "requests.", "fsspec.")


def retry(url: str, call: Callable[[], T]) -> T:
    """call(), again after failures that may pass: dropped connections, throttling, 5xx.

    Pauses double and are drawn at random below that ("full jitter", Brooker 2015, AWS
    Architecture Blog), so that a thousand ranks do not come back at the same moment. What
    will not pass (401, 403, 404, no credentials), or has not after 8 attempts, is a UserError.
    """
    for attempt in range(_ATTEMPTS):
        try:
            return call()
        except Exception as error:
            if isinstance(error, UserError) or not _is_remote(error):
                raise
            status = _status(error)
            if not _passes(error, status):
                raise UserError(_remedy(url, error, status)) from error
            if attempt == _ATTEMPTS - 1:
                raise UserError(
                    f"cannot read {url} in {_ATTEMPTS} attempts: {_text(error)}; where the store "
                    "answers again, start the run again to resume it"
                ) from error
            pause = min(_FIRST_PAUSE_S * 2**attempt, _LONGEST_PAUSE_S)
            time.sleep(random.uniform(0, pause))
    raise AssertionError


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _from_network(error: BaseException) -> bool:
    return f"{type(error).__module__}.".startswith(_NETWORK)


def _is_remote(error: Exception) -> bool:
    """Whether storage can be the cause; anything else is a defect, and shows itself."""
    return isinstance(error, OSError) or any(map(_from_network, _chain(error)))


def _status(error: Exception) -> int | None:
    """The HTTP status behind an error: fsspec hides a 503 in a FileNotFoundError."""
    for cause in _chain(error):
        status = getattr(cause, "status", None)  # aiohttp
        response = getattr(cause, "response", None)  # botocore
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if isinstance(status, int) and status >= 300:
            return status
    return None


def _passes(error: Exception, status: int | None) -> bool:
    if status is not None:
        return status not in _FINAL
    if any(type(cause).__name__ == "NoCredentialsError" for cause in _chain(error)):
        return False
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
        # Also what fsspec makes of a refused connection.
        return any(map(_from_network, _chain(error.__cause__)))
    return True


def _remedy(url: str, error: Exception, status: int | None) -> str:
    if status == 404 or (status is None and isinstance(error, FileNotFoundError)):
        return f"{url} does not exist; check data.path, and that all shards were uploaded"
    return (
        f"{url} may not be read ({_text(error)}); give this machine credentials that may, such as "
        "AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for s3://"
    )


def _text(error: Exception) -> str:
    """An error and, where that is another one, what it came from."""
    texts = [str(cause) or type(cause).__name__ for cause in (error, error.__cause__) if cause]
    return ": ".join(dict.fromkeys(texts))
