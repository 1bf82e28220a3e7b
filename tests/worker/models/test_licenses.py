"""The licence that a model card names."""

from pathlib import Path

import pytest

from worker.models.licenses import license_of


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: apache-2.0\ntags: [a]\n---\n# x", "apache-2.0"),
        ("---\r\nlicense: mit\r\n---\r\n", "mit"),
        ("---\nlicense: other\nlicense_name: gemma\n---\n", "gemma"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\nlicense: [mit, apache-2.0]\n---\n", "mit and apache-2.0"),
        ("---\nlicense: {a: b}\n---\n", None),
        ("---\nlicense: 'a\\nb'\n---\n", None),
        ("---\nlicense: !!python/object:os.system x\n---\n", None),
        ("---\nlicense: " + "[" * 5000 + "\n---\n", None),
        ("---\nlicense: !!int ''\n---\n", None),
        ("---\nlicense: !!timestamp foo\n---\n", None),
        ("---\na: &a [x, x]\nb: &b [*a, *a]\nlicense: [*b]\n---\n", None),
        ("---\n- a\n---\n", None),
        ("# no front matter\nlicense: mit", None),
        ("", None),
        ("\x00\xff", None),
    ],
)
def test_only_a_short_name_in_the_front_matter_is_a_licence(
    tmp_path: Path, card: str, expected: str | None
) -> None:
    (tmp_path / "README.md").write_bytes(card.encode("latin-1"))
    assert license_of(tmp_path) == expected


def test_a_folder_without_a_card_names_no_licence(tmp_path: Path) -> None:
    assert license_of(tmp_path) is None
    (tmp_path / "README.md").symlink_to("/etc/passwd")
    assert license_of(tmp_path) is None
