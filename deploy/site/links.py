"""MkDocs hook for links to files that are not part of the site, such as `bench/LOG.md`."""

import posixpath
import re

LINK = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)\s]+)\)")


def on_page_markdown(markdown, page, **_):
    """Replaces links that leave the folder docs/ by the name of the file in the checkout."""

    def replaced(match):
        text, target = match.groups()
        folder = posixpath.dirname(page.file.src_uri)
        path = posixpath.normpath(posixpath.join("docs", folder, target))
        if path.startswith("docs/"):
            return match[0]
        return f"`{path}`" if text.strip("`") == path else f"{text} (`{path}` in the checkout)"

    return LINK.sub(replaced, markdown)
