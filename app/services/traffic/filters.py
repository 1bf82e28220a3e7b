"""Filters that lists take as query parameters."""

import re
from collections.abc import Mapping
from typing import Final

from app.errors import BadRequest

METADATA_FILTER: Final = re.compile(r"metadata\[(.{1,64})\]", re.DOTALL)
MAX_METADATA: Final = 16


def metadata_filter(query: Mapping[str, str]) -> dict[str, str]:
    """Returns the pairs of the query parameters `metadata[key]=value`.

    Raises BadRequest if there are too many.
    """
    wanted = {m[1]: value for key, value in query.items() if (m := METADATA_FILTER.fullmatch(key))}
    if len(wanted) > MAX_METADATA:
        raise BadRequest(
            f"metadata has {len(wanted)} pairs, at most {MAX_METADATA} are allowed",
            param="metadata",
        )
    return wanted
