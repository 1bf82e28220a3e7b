"""Writes the vendored libraries of the dashboard from npm packages, with versions and hashes.

Run it in a folder with the packages, and name the folder:

    npm pack preact htm @preact/signals @preact/signals-core uplot axe-core
    python -m tests.dashboard.vendor FOLDER

The browser resolves no bare module names, and an import map would need an inline script. So each
`from "preact"` becomes a relative path. Nothing else in the modules changes, except that comments
naming source maps are removed.
"""

import hashlib
import json
import re
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
VENDOR = ROOT / "app" / "dashboard" / "vendor"
AXE = ROOT / "tests" / "dashboard" / "axe"
IMPORT = re.compile(r'(\bfrom ?)"([^."][^"]*)"')
SOURCE_MAP = re.compile(r"\n?/[/*]# sourceMappingURL=\S+( \*/)?\s*$")


@dataclass(frozen=True)
class Source:
    """A file of an npm package, and its name here. `suffix` is added to its end."""

    package: str
    path: str
    name: str
    suffix: str = ""


SOURCES = (
    Source("preact", "dist/preact.mjs", "preact.js"),
    Source("preact", "hooks/dist/hooks.mjs", "hooks.js"),
    Source("@preact/signals-core", "dist/signals-core.mjs", "signals-core.js"),
    Source("@preact/signals", "dist/signals.mjs", "signals.js"),
    Source("htm", "dist/htm.mjs", "htm.js"),
    # The package's only minified build is a script, so an export makes it a module.
    Source("uplot", "dist/uPlot.iife.min.js", "uplot.js", "\nexport default uPlot;\n"),
    Source("uplot", "dist/uPlot.min.css", "uplot.css"),
)
AXE_SOURCE = Source("axe-core", "axe.min.js", "axe.min.js")
MODULES = {
    "preact": "./preact.js",
    "preact/hooks": "./hooks.js",
    "@preact/signals-core": "./signals-core.js",
}


class Package:
    """An npm package that `npm pack` downloaded to a folder."""

    def __init__(self, folder: Path, name: str) -> None:
        stem = name.removeprefix("@").replace("/", "-")
        (path,) = (p for p in folder.glob(f"{stem}-*.tgz") if re.match(rf"{stem}-\d", p.name))
        with tarfile.open(path) as archive:
            self._files = {
                member.name.removeprefix("package/"): file.read()
                for member in archive
                if member.isfile() and (file := archive.extractfile(member)) is not None
            }
        self.facts: dict[str, Any] = json.loads(self._files["package.json"])

    def text(self, path: str) -> str:
        return self._files[path].decode()


def vendored(text: str, source: Source) -> str:
    """Returns the text of a vendored file, with relative imports and without source maps."""
    linked = IMPORT.sub(lambda match: f'{match[1]}"{MODULES.get(match[2], match[2])}"', text)
    return SOURCE_MAP.sub("", linked).rstrip("\n") + "\n" + source.suffix.lstrip("\n")


def write(folder: Path, sources: tuple[Source, ...], target: Path) -> None:
    """Writes the files, their licences, and vendor.json with version, licence and SHA-256."""
    (target / "licences").mkdir(parents=True, exist_ok=True)
    entries = []
    for source in sources:
        package = Package(folder, source.package)
        content = vendored(package.text(source.path), source).encode()
        (target / source.name).write_bytes(content)
        licence = f"licences/{source.package.removeprefix('@').replace('/', '-')}.txt"
        (target / licence).write_text(package.text("LICENSE"))
        entries.append(
            {
                "file": source.name,
                "package": source.package,
                "version": package.facts["version"],
                "licence": package.facts["license"],
                "licence_file": licence,
                "sha256": hashlib.sha256(content).hexdigest(),
            }
        )
    (target / "vendor.json").write_text(json.dumps(entries, indent=2) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]), SOURCES, VENDOR)
    write(Path(sys.argv[1]), (AXE_SOURCE,), AXE)
