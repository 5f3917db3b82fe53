"""Secrets are kept out of everything that is stored or shown.

A recipe that holds one is refused (it would be copied into the run directory, job scripts,
wandb and the report); in texts that come from elsewhere, such as errors, secrets are masked.
"""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from bigbatch.configs.errors import UserError
from bigbatch.configs.printable import printable

MASK = "***"
MAX_MESSAGE = 3000  # characters

# The end of a name that promises a secret value: WANDB_API_KEY, db-password, sessionToken.
_NAME = (
    r"(?:api|access|secret|private|signing|encryption|account)[_-]?key(?:[_-]?id)?|secret|token|"
    r"password|(?<!/)passwd|pwd|passphrase|credentials?|authorization|auth|cookie|signature"
)
_SECRET_NAME = re.compile(rf"(?:{_NAME})$", re.I)
# The value of such a name, in NAME=value, name: value, "name": "value" ...
_ASSIGNED = re.compile(
    rf"(?P<before>(?:{_NAME})[\"']?\s*[=:]\s*(?:bearer\s+|basic\s+)?[\"']?)"
    r"(?P<secret>[^\s\"'&;,#)}\]]{3,})",
    re.I,
)
# ... and in --name value.
_OPTION = re.compile(
    rf"(?P<before>(?<![\w-])--?[\w-]{{0,60}}?(?:{_NAME})\s+)(?P<secret>[^\s-]\S{{2,}})", re.I
)
_HEADER = re.compile(r"(?P<before>\b(?:bearer|basic)\s+)(?P<secret>[A-Za-z0-9+/=._~-]{16,})", re.I)
_USER_INFO = re.compile(r"(?P<before>\b[a-z][a-z0-9+.-]{0,20}://)(?P<secret>[^\s/@?#]+)(?=@)", re.I)
# What signs a URL: AWS, Google, Azure, CloudFront.
_QUERY = re.compile(
    r"(?P<before>[?&;](?:x-(?:amz|goog)-(?:signature|credential|security-token)|signature|sig|"
    r"awsaccesskeyid|googleaccessid|key-pair-id|policy|key|code)=)(?P<secret>[^\s&;#\"']+)",
    re.I,
)
# Secrets that are known by their own form.
_FORMS = re.compile(
    r"(?P<before>)(?P<secret>"
    r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|"  # AWS access key
    r"\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{30,}|"  # GitHub
    r"\bhf_[A-Za-z0-9]{30,}|"  # Hugging Face
    r"(?<![\w-])sk-[A-Za-z0-9_-]{20,}|\bAIza[\w-]{35}|"  # OpenAI and the like, Google
    r"(?<![\w-])xox[abpr]-[A-Za-z0-9-]{10,}|"  # Slack
    r"\bwandb_v1_[A-Za-z0-9_]{20,}|"  # wandb
    r"(?<![\w-])eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,}|"  # JSON web token
    r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]{0,40}PRIVATE KEY-----|$))"
)
_PATTERNS = (_FORMS, _USER_INFO, _QUERY, _HEADER, _ASSIGNED, _OPTION)
_FOLDERS = {"PWD", "OLDPWD"}  # where the shell is and was: no passwords
_SHORTEST = 8  # of an environment variable's value that is masked wherever it turns up


def redact(value: Any, env: Mapping[str, str] | None = None) -> Any:
    """Plain values with secrets masked: texts by their form, dict values also by their key.

    The values of environment variables that sound like secrets are masked everywhere.
    """
    known = _known(os.environ if env is None else env)
    return _redact(value, known)


def _redact(value: Any, known: list[str]) -> Any:
    if isinstance(value, str):
        for secret in known:
            value = value.replace(secret, MASK)
        for pattern in _PATTERNS:
            value = pattern.sub(_mask, value)
        return value
    if isinstance(value, Mapping):
        return {
            _redact(k, known): MASK if _is_secret(k, v) else _redact(v, known)
            for k, v in value.items()
        }
    if isinstance(value, list | tuple):
        return [_redact(item, known) for item in value]
    return value


def message(error: Exception) -> str:
    """What a person is told of an error: without secrets, not endless, and text alone."""
    text = printable(redact(str(error)))
    return text if len(text) <= MAX_MESSAGE else text[: MAX_MESSAGE - 3] + "..."


def refuse_secrets(tree: Any, source: str) -> None:
    """Raise UserError, without the secret, where a tree of plain values holds one."""
    for place, value in _leaves(tree, ()):
        secret = _is_secret(place[-1] if place else "", value)
        if secret or (isinstance(value, str) and _redact(value, []) != value):
            raise UserError(
                f"{source}: {'.'.join(map(str, place))} holds a secret, which would be stored "
                "with every run; put it into the environment or a credentials file "
                "(AWS_PROFILE, ~/.netrc, WANDB_API_KEY, ...) and remove it here"
            )


def _mask(match: re.Match[str]) -> str:
    return match["before"] + MASK


def _known(env: Mapping[str, str]) -> list[str]:
    """Secret values in the environment, longest first: one may hold another."""
    names = [name for name in env if _SECRET_NAME.search(name) and name not in _FOLDERS]
    values = {env[name] for name in names if len(env[name]) >= _SHORTEST}
    return sorted(values, key=len, reverse=True)


def _is_secret(name: Any, value: Any) -> bool:
    return (
        isinstance(name, str)
        and isinstance(value, str)
        and bool(value and value != MASK and _SECRET_NAME.search(name))
    )


def _leaves(tree: Any, place: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, (*place, key))
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from _leaves(value, (*place, index))
    else:
        yield place, tree
