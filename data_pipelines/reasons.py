"""Why samples can't be used, in words that are the same for all with the same fault."""

import re

_LONGEST = 160

_PARTICULAR = (
    (r"<[\w.]+ [^<>]*at 0x[0-9a-f]+>", "…"),  # an object, by its address
    (r"""(?<!\w)(["'])(?:(?!\1).)*\1(?!\w)""", "…"),
    (r"\S*/\S*", "…"),
    (r"\d[\d,.]*(?<![,.])", "N"),
)
"""What messages name of one sample alone: quoted texts, paths, numbers."""


def message(error: Exception) -> str:
    """An error in one line; the kind is named where it isn't one that is raised for users to read."""
    told = str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"
    return " ".join(told.split())


def reason(error: Exception) -> str:
    """The message without what is particular to a sample, so that equal ones can be counted."""
    told = message(error)
    for pattern, instead in _PARTICULAR:
        told = re.sub(pattern, instead, told)
    return told if len(told) <= _LONGEST else f"{told[: _LONGEST - 1]}…"
