"""Text from data, as a terminal may show it: names of classes, keys, paths, messages of others."""

import re

# What moves the cursor, colours, rings or hides (C0, DEL, C1), turns the direction of writing, or
# cannot be encoded (lone surrogates, as names of files that are no UTF-8 have them).
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """`text` with each character that is no text replaced by one that shows it was there.

    Ends of lines and tabs stay. Control characters become the pictures that Unicode has of them,
    one column wide, others U+FFFD.
    """
    return _HIDDEN.sub(_picture, text) if _HIDDEN.search(text) else text


def _picture(match: re.Match[str]) -> str:
    code = ord(match[0])
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"
