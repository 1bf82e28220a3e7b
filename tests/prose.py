"""Checks the English of docstrings and comments: `python -m tests.prose [PATH ...]`.

It reports words that are not standard terms, sentences of more than 25 words, docstrings that begin
like a riddle ("What lies between ..."), and public functions and classes without a docstring.
"""

import argparse
import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).resolve().parents[1]
FOLDERS: Final = ("app", "worker")
MAX_WORDS: Final = 25
WORDS: Final = re.compile(
    r"\b(lay|lays|laid|laying|mend|mends|mended|mending|bell|bells|doorbells?|rung|rings?|crowds?|crowded"
    r"|whoever|whomever|whatever|nobody|somebody|seldom|in vain|riddle|heart|hearts|for nothing"
    r"|asked-for|newcomers?|leavings|zombies?|corpses?|graduates?|judges?|dealt out|stands still)\b",
    re.IGNORECASE,
)
RIDDLES: Final = re.compile(r"(What|Whether|Where|Who|How|Of|Why|When|As|Only|All that|That)\b")
SENTENCE_END: Final = re.compile(r"(?<=[.!?:;])\s+|\n\s*\n|\n\s*[-*] ")
CODE: Final = re.compile(r"`[^`]*`|\$[^$]*\$")


class Finding(NamedTuple):
    """One complaint about one place."""

    path: Path
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT).as_posix()}:{self.line}: {self.text}"


def findings(path: Path) -> Iterator[Finding]:
    """Yields what is wrong with the docstrings and comments of a Python file."""
    source = path.read_text()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node)
        line = getattr(node, "lineno", 1)
        if text is None:
            if is_public(node) and (path.name != "__init__.py" or source.strip()):
                name = getattr(node, "name", "module")
                yield Finding(path, line, f"{name} has no docstring")
            continue
        if RIDDLES.match(text):
            first = text.split(maxsplit=1)[0]
            yield Finding(
                path, line, f"docstring begins with {first!r}; begin with a verb or a noun"
            )
        yield from (Finding(path, line, wrong) for wrong in wrongs_of(text))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            for wrong in wrongs_of(token.string.lstrip("# ")):
                yield Finding(path, token.start[0], wrong)


def is_public(node: ast.AST) -> bool:
    """Returns whether a docstring is required: for modules, and for public functions and classes."""
    if isinstance(node, ast.Module):
        return True
    name: str = getattr(node, "name", "")
    is_method = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and any(
        argument.arg in ("self", "cls") for argument in node.args.args[:1]
    )
    return not name.startswith("_") and not is_method


def wrongs_of(text: str) -> Iterator[str]:
    """Yields the complaints about one docstring or comment."""
    text = CODE.sub("x", text)
    for word in WORDS.findall(text):
        yield f"{word!r} is not a standard term here"
    for sentence in SENTENCE_END.split(text):
        num_words = len(re.findall(r"[A-Za-z][\w'/-]*", sentence))
        if num_words > MAX_WORDS:
            yield f"sentence of {num_words} words: {' '.join(sentence.split())[:60]}..."


def main() -> int:
    """Prints all findings and returns 1 if there are any."""
    parser = argparse.ArgumentParser(prog="python -m tests.prose", description=__doc__)
    parser.add_argument("paths", nargs="*", type=Path, default=[ROOT / name for name in FOLDERS])
    paths = parser.parse_args().paths
    files = sorted(
        file
        for path in paths
        for file in (path.resolve().rglob("*.py") if path.is_dir() else [path.resolve()])
    )
    found = [finding for file in files for finding in findings(file)]
    for finding in found:
        print(finding)
    print(f"{len(found)} findings in {len(files)} files")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
