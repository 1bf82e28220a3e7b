"""Finds texts that are nearly equal, by the Jaccard similarity of their sets of 5-grams.

MinHash signatures and locality-sensitive hashing find candidates, whose similarity is then computed
exactly. 20 bands of 5 hashes find a pair with a similarity of s with the probability
1 - (1 - s^5)^20: 0.9996 for 0.8, 0.80 for 0.6, and 0.47 for 0.5.

Source: Broder, On the resemblance and containment of documents, 1997.
"""

import unicodedata
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt
from rensa import RMinHash

SHINGLE_CHARACTERS: Final = 5
NUM_BANDS: Final = 20
HASHES_PER_BAND: Final = 5
NUM_HASHES: Final = NUM_BANDS * HASHES_PER_BAND
SEED: Final = 20261128
# The estimate of a similarity has a standard deviation of at most 0.05. A candidate is compared
# exactly unless its estimate is this far below the threshold.
MARGIN: Final = 0.15
MAX_PER_BUCKET: Final = 1000  # candidates of one band; those added last
MAX_COMPARED: Final = 50  # most similar candidates that are compared exactly
CACHED_SETS: Final = 512


def normalised(text: str) -> str:
    """Returns the text without differences of case, width and white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def shingles(text: str) -> frozenset[str]:
    """Returns the set of all substrings of 5 characters, or the text itself if it is shorter."""
    num_places = max(1, len(text) - SHINGLE_CHARACTERS + 1)
    return frozenset(text[place : place + SHINGLE_CHARACTERS] for place in range(num_places))


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    """Returns the size of the intersection divided by the size of the union."""
    num_shared = len(one & other)
    return num_shared / (len(one) + len(other) - num_shared)


class SimilarTexts:
    """Index of normalised texts that finds those similar to a new one.

    `text_of` returns the text of an item. The index keeps only the signatures.
    """

    def __init__(self, threshold: float, text_of: Callable[[int], str]) -> None:
        self._threshold = threshold
        self._buckets: dict[tuple[int, int], list[int]] = {}
        self._items: list[int] = []
        self._signatures: npt.NDArray[np.uint32] = np.empty((64, NUM_HASHES), dtype=np.uint32)
        self._sets = lru_cache(CACHED_SETS)(lambda item: shingles(text_of(item)))

    def add(self, item: int, text: str) -> list[int]:
        """Returns the items that are similar to the text, and then adds the text under `item`."""
        text_set = shingles(text)
        signature = _signature(text_set)
        similar = list(self._similar(text_set, signature))
        self._insert(item, signature)
        return similar

    def add_unless_similar(self, item: int, text: str) -> bool:
        """Adds the text and returns True, or returns False if a similar one is in the index."""
        text_set = shingles(text)
        signature = _signature(text_set)
        if next(self._similar(text_set, signature), None) is not None:
            return False
        self._insert(item, signature)
        return True

    def _similar(
        self, text_set: frozenset[str], signature: npt.NDArray[np.uint32]
    ) -> Iterator[int]:
        """Yields the items that are similar, the most similar by the estimate first."""
        places: set[int] = set()
        for bucket in _bands(signature):
            places.update(self._buckets.get(bucket, [])[-MAX_PER_BUCKET:])
        candidates = sorted(places)
        if not candidates:
            return
        estimates = (self._signatures[candidates] == signature).mean(axis=1)
        for rank in np.argsort(-estimates, kind="stable")[:MAX_COMPARED]:
            if estimates[rank] < self._threshold - MARGIN:
                return
            item = self._items[candidates[rank]]
            if jaccard(text_set, self._sets(item)) >= self._threshold:
                yield item

    def _insert(self, item: int, signature: npt.NDArray[np.uint32]) -> None:
        place = len(self._items)
        if place == len(self._signatures):
            self._signatures = np.concatenate([self._signatures, np.empty_like(self._signatures)])
        self._signatures[place] = signature
        self._items.append(item)
        for bucket in _bands(signature):
            self._buckets.setdefault(bucket, []).append(place)


def _signature(text_set: frozenset[str]) -> npt.NDArray[np.uint32]:
    minhash = RMinHash(NUM_HASHES, SEED)
    minhash.update(list(text_set))
    return np.array(minhash.digest(), dtype=np.uint32)


def _bands(signature: npt.NDArray[np.uint32]) -> list[tuple[int, int]]:
    """Returns the bucket of each band: the band's number and a hash of its part."""
    parts = signature.reshape(NUM_BANDS, HASHES_PER_BAND)
    return [(band, hash(part.tobytes())) for band, part in enumerate(parts)]
