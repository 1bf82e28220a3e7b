"""Recognises personal data and secrets by their form and checksums, and masks them.

Names, addresses and other personal data without a fixed form are not recognised.
"""

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final

from app.contracts.datasets import MASK_KINDS, MaskKind

VERSION: Final = 1  # of the rules, stored in the report of a data set

SECRET: Final = re.compile(
    r"""
    -----BEGIN\ [A-Z ]{0,20}PRIVATE\ KEY-----.{0,20000}?-----END\ [A-Z ]{0,20}PRIVATE\ KEY-----
    | \b(?:
        sk-[A-Za-z0-9_-]{20,200}                    # OpenAI, Anthropic, Stillhouse
      | (?:sk|rk|pk)_(?:live|test)_[A-Za-z0-9]{16,200}  # Stripe
      | gh[oprsu]_[A-Za-z0-9]{36,255}
      | github_pat_[A-Za-z0-9_]{22,255}
      | glpat-[A-Za-z0-9_-]{20,100}
      | (?:AKIA|ASIA)[0-9A-Z]{16}                   # AWS
      | AIza[0-9A-Za-z_-]{35}                       # Google
      | ya29\.[0-9A-Za-z_-]{20,400}
      | xox[abeprs]-[A-Za-z0-9-]{10,250}            # Slack
      | hf_[A-Za-z0-9]{30,100}
      | npm_[A-Za-z0-9]{36}
      | pypi-[A-Za-z0-9_-]{50,300}
      | SG\.[A-Za-z0-9_-]{16,64}\.[A-Za-z0-9_-]{16,64}  # SendGrid
      | eyJ[A-Za-z0-9_-]{8,2000}\.eyJ[A-Za-z0-9_-]{8,4000}\.[A-Za-z0-9_-]{8,2000}  # JWT
    )
    """,
    re.VERBOSE | re.DOTALL,
)
EMAIL: Final = re.compile(
    r"(?<![\w.%+-])[\w.%+-]{1,64}@(?:[\w](?:[\w-]{0,61}[\w])?\.){1,8}[^\W\d_]{2,24}(?![\w-])"
)
IBAN: Final = re.compile(r"\b[A-Z]{2}\d{2}(?:[ ]?[A-Z0-9]{4}){2,7}(?:[ ]?[A-Z0-9]{1,3})?\b")
CARD: Final = re.compile(
    r"""
    (?<![\w.-])(?:
        \d{4}([ -])\d{4}\1\d{4}\1\d{4}(?:\1\d{3})?
      | \d{4}([ -])\d{6}\2\d{4,5}
      | \d{13,19}
    )(?![\w-])
    """,
    re.VERBOSE,
)
# First digits of the numbers of card networks, and the lengths of their numbers.
NETWORKS: Final = {
    "2": (16,), "30": (14,), "34": (15,), "35": (16,), "36": (14,), "37": (15,), "38": (14,),
    "4": (13, 16, 19), "5": (16,), "6": (16, 17, 18, 19),
}  # fmt: skip
IPV4: Final = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)")
IPV6: Final = re.compile(r"(?<![\w:])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])")
PHONE: Final = re.compile(
    r"""
    (?<![\w+.-])(?:
        (?:\+|(?<!\d[ ])00)[1-9](?:[ ./()-]{0,2}\d){6,14}  # with a country code
      | \(\d{2,5}\)[ ]?\d{2,4}(?:[ ./-]?\d{2,4}){1,3}  # with an area code in brackets
      | \d{3}[-. ]\d{3}[-. ]\d{4}                      # North America
      | (?<!\d[ ])0\d{1,4}[ /-]\d{2,4}(?:[ /-]?\d{2,4}){1,3}  # with a trunk prefix
    )(?![\w-])
    """,
    re.VERBOSE,
)


def has_iban_checksum(text: str) -> bool:
    """Returns whether the text is an IBAN: 15 to 34 characters that are 1 modulo 97."""
    number = text.replace(" ", "")
    if not 15 <= len(number) <= 34:
        return False
    digits = "".join(str(int(character, 36)) for character in number[4:] + number[:4])
    return int(digits) % 97 == 1


def has_card_checksum(text: str) -> bool:
    """Returns whether the digits have the prefix and the Luhn checksum of a payment card."""
    digits = [int(character) for character in text if character.isdigit()]
    lengths = NETWORKS.get(text[:1]) or NETWORKS.get(text[:2]) or ()
    if len(digits) not in lengths or len(set(digits)) == 1:
        return False
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def is_phone(text: str) -> bool:
    """Returns whether the text has as many digits as a phone number: 8 to 15."""
    return 8 <= sum(character.isdigit() for character in text) <= 15


def is_ip_address(text: str) -> bool:
    """Returns whether the text is an IP address that may identify a person."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return not (address.is_unspecified or address.is_loopback)


@dataclass(frozen=True)
class Recogniser:
    """Finds one kind of data: a pattern, a check of each match, and the form that is compared."""

    pattern: re.Pattern[str]
    is_valid: Callable[[str], bool] = bool
    key: Callable[[str], str] = str


def compact(text: str) -> str:
    """Returns only the letters and digits, and a leading plus."""
    return "".join(character for character in text if character.isalnum() or character == "+")


# In the order in which they are applied: an earlier kind hides its matches from the later ones.
RECOGNISERS: Final[Mapping[MaskKind, tuple[Recogniser, ...]]] = {
    "secret": (Recogniser(SECRET),),
    "email": (Recogniser(EMAIL, key=str.lower),),
    "iban": (Recogniser(IBAN, has_iban_checksum, compact),),
    "card": (Recogniser(CARD, has_card_checksum, compact),),
    "ip_address": (Recogniser(IPV4, is_ip_address), Recogniser(IPV6, is_ip_address, str.lower)),
    "phone": (Recogniser(PHONE, is_phone, compact),),
}


class Masker:
    """Masks the texts of one conversation. Equal values get the same placeholder in all of them.

    A placeholder names the kind and a number, such as `[EMAIL_1]`. `counts` has the number of
    replaced places by kind.
    """

    def __init__(self, kinds: Collection[MaskKind] = MASK_KINDS) -> None:
        self.counts: Counter[MaskKind] = Counter()
        self._recognisers = [
            (kind, recogniser) for kind, recogniser in _in_order() if kind in kinds
        ]
        self._numbers: dict[tuple[MaskKind, str], int] = {}
        self._num_distinct: Counter[MaskKind] = Counter()

    def mask(self, text: str) -> str:
        """Returns the text with placeholders in place of what is recognised."""
        for kind, recogniser in self._recognisers:
            text = recogniser.pattern.sub(partial(self._replace, kind, recogniser), text)
        return text

    def _replace(self, kind: MaskKind, recogniser: Recogniser, match: re.Match[str]) -> str:
        text = match[0]
        if not recogniser.is_valid(text):
            return text
        self.counts[kind] += 1
        value = (kind, recogniser.key(text))
        if value not in self._numbers:
            self._num_distinct[kind] += 1
            self._numbers[value] = self._num_distinct[kind]
        return f"[{kind.upper()}_{self._numbers[value]}]"


def _in_order() -> Iterator[tuple[MaskKind, Recogniser]]:
    for kind, recognisers in RECOGNISERS.items():
        for recogniser in recognisers:
            yield kind, recogniser
