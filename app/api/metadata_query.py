"""Selection by metadata in the query of a list: `metadata[key]=value`."""

import re
from collections.abc import Mapping
from typing import Final

from app.errors import BadRequest

METADATA_PAIR: Final = re.compile(r"(?s)metadata\[(.{1,64})\]")
# For `app.api.deps.known_query`: how an error shows the parameter, and what it matches.
METADATA_QUERY: Final = {"metadata[key]": METADATA_PAIR.pattern}
MAX_PAIRS: Final = 16


def metadata_pairs(query: Mapping[str, str]) -> dict[str, str]:
    """Returns the keys and values of the query parameters `metadata[key]=value`.

    Raises BadRequest if there are too many.
    """
    pairs = {m[1]: value for name, value in query.items() if (m := METADATA_PAIR.fullmatch(name))}
    if len(pairs) > MAX_PAIRS:
        raise BadRequest(
            f"metadata has {len(pairs)} pairs, at most {MAX_PAIRS} are allowed; leave some out",
            param="metadata",
        )
    return pairs
