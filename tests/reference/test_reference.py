"""The pages of docs/reference say what the source says."""

from collections.abc import Iterator

import pytest

from tests.documentation import DOCS
from tests.reference.codes import response_codes, trees
from tests.reference.pages import pages, split_docstring


@pytest.fixture(autouse=True, scope="module")
def forget_syntax_trees() -> Iterator[None]:
    """Frees the syntax trees of the whole project, which hold 700,000 objects."""
    yield
    trees.cache_clear()


def test_the_pages_are_up_to_date() -> None:
    outdated = [path for path, text in pages().items() if (DOCS / path).read_text() != text]
    assert outdated == [], "run `python -m tests.reference`"


def test_codes_of_all_kinds_are_found() -> None:
    codes = {
        code: {reply.status for reply in replies} for code, replies in response_codes().items()
    }
    assert codes["invalid_api_key"] == {401}  # the attribute of a class
    assert codes["resource_in_use"] == {409}  # a positional argument
    assert codes["bad_logits"] == {500}  # from a serve worker
    assert codes["invalid_function_parameters"] == {400}  # a constant
    assert codes["tokenizer_mismatch"] == {400}  # an argument of a function that raises


def test_docstrings_are_divided_into_paragraphs_and_entries() -> None:
    text = "About.\n\nkind:\n    one: First\n        and only.\nsize: In bytes.\n\nLast."
    about, entries = split_docstring(text)
    assert about == "About.\n\nLast."
    assert entries == {"kind": "`one`: First and only.", "size": "In bytes."}
