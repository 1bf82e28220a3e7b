"""Writes the pages of docs/reference: `python -m tests.reference`."""

from tests.documentation import DOCS
from tests.reference.pages import pages

if __name__ == "__main__":
    for path, text in pages().items():
        (DOCS / path).parent.mkdir(exist_ok=True)
        (DOCS / path).write_text(text)
        print(f"docs/{path}")
