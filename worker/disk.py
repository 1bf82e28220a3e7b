"""Recognises errors caused by a full disk or quota, also if a library has wrapped them."""

import errno
import os
import re
from collections.abc import Iterator

FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSED = (*FULL, errno.EFBIG)  # EFBIG: RLIMIT_FSIZE, or the file system's limit on file size
# safetensors and tokenizers give the error number only in the message. numpy's tofile reports a
# short write without a number.
WRAPPED = re.compile(
    "|".join(
        [
            *(rf"\(os error {number}\)" for number in REFUSED),
            *(re.escape(os.strerror(number)) for number in FULL),
            r"\d+ requested and \d+ written",
        ]
    )
)


def is_disk_full(error: BaseException) -> bool:
    """Returns whether the error, or one in its chain of causes, is due to a full disk or quota."""
    return any(_refuses_a_write(link) for link in _chain(error))


def mentions_full_disk(text: str) -> bool:
    """Returns whether the text, for example a traceback, reports a full disk or quota."""
    return WRAPPED.search(text) is not None


def _refuses_a_write(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in REFUSED
    return mentions_full_disk(str(error))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yields the error and its causes or contexts, as a traceback shows them."""
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ if link.__cause__ or link.__suppress_context__ else link.__context__
