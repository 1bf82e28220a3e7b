"""Pages of the documentation as data: code blocks, headings and links."""

import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).resolve().parents[1]
DOCS: Final = ROOT / "docs"
FENCED: Final = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK: Final = re.compile(r"(?<!\\)\]\(([^)\s]+)\)")
CODE_SPAN: Final = re.compile(r"`[^`\n]*`")


class Block(NamedTuple):
    """A fenced code block."""

    language: str
    code: str


def code_blocks(text: str, *languages: str) -> list[Block]:
    """Returns the code blocks of a page in order; those of the languages if any are given."""
    blocks = [Block(*match) for match in FENCED.findall(text)]
    return [block for block in blocks if not languages or block.language in languages]


def sections(text: str) -> Iterator[tuple[str, str]]:
    """Yields the headings of the second level with the text below them."""
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        heading, _, body = section.partition("\n")
        yield heading, body


def links(text: str) -> list[str]:
    """Returns the targets of the links of a page that are not addresses of other hosts."""
    prose = CODE_SPAN.sub("", FENCED.sub("", text))
    return [target for target in LINK.findall(prose) if not re.match(r"[a-z]+:", target)]


def anchors(text: str) -> set[str]:
    """Returns the anchors of the headings of a page, as MkDocs names them."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", text), re.MULTILINE)
    return {_anchor(heading) for heading in headings}


def _anchor(heading: str) -> str:
    plain = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
    plain = re.sub(r"\]\([^)]*\)", "", plain)
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())
