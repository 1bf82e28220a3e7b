"""Limits by the command line, on a real database."""

import json

import pytest
from typer.testing import CliRunner

from app.commands.cli import cli
from app.db.keys import read_key
from app.db.usage.limits import UNLIMITED, Limits


@pytest.fixture
def pepper(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLHOUSE_KEY_PEPPER", "pepper")


def run(*words: str, exit_code: int = 0) -> str:
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == exit_code, result.output
    return result.output


def limits_of(key: str) -> tuple[Limits, Limits]:
    facts = read_key(key.split("-")[2])
    assert facts is not None
    return facts.limits, facts.project_limits


def test_a_key_is_created_with_limits_that_can_be_changed(pepper: None) -> None:
    key = run(
        "keys", "create", "--project", "p", "--requests-per-minute", "60",
        "--tokens-per-minute", "10_000", "--monthly-tokens", "5,000,000",
    ).split()[-1]  # fmt: skip
    assert limits_of(key) == (Limits(60, 10_000, None, 5_000_000), UNLIMITED)
    shown = run("keys", "limit", key, "--tokens-per-minute", "none", "--daily-tokens", "7")
    assert limits_of(key)[0] == Limits(60, None, 7, 5_000_000)
    assert shown == run("keys", "limit", key.split("-")[2])
    assert shown.split("\n")[1:4] == [
        "tokens_per_minute: none",
        "daily_tokens: 7",
        "monthly_tokens: 5,000,000",
    ]


def test_a_project_is_limited_listed_and_freed(pepper: None) -> None:
    key = run("keys", "create", "--project", "p").split()[-1]
    run("projects", "limit", "p", "--requests-per-minute", "9", "--daily-tokens", "8")
    run("projects", "limit", "p", "--tokens-per-minute", "7")
    assert limits_of(key) == (UNLIMITED, Limits(9, 7, 8))
    assert run("projects", "list").splitlines()[1].split() == ["p", "9", "7", "8", "none"]
    listed = json.loads(run("projects", "list", "--json"))
    assert listed["data"] == [
        {"project": "p", "requests_per_minute": 9, "tokens_per_minute": 7, "daily_tokens": 8,
         "monthly_tokens": None}
    ]  # fmt: skip
    for name in ("requests-per-minute", "tokens-per-minute", "daily-tokens"):
        run("projects", "limit", "p", f"--{name}", "none")
    assert limits_of(key) == (UNLIMITED, UNLIMITED)
    assert "p" not in run("projects", "list").split()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["keys", "limit", "0123456789abcdef", "--daily-tokens", "5"], "no such key"),
        (["keys", "limit", "k", "--tokens-per-minute", "0"], "--tokens-per-minute must be"),
        (["keys", "limit", "k", "--requests-per-minute", "50000001"], "from 1 to 50,000,000"),
        (["projects", "limit", "p", "--monthly-tokens", "many"], "it is many"),
        (["projects", "limit", "p", "--daily-tokens", "9" * 5000], "--daily-tokens must be"),
    ],
)
def test_what_is_wrong_is_said(pepper: None, words: list[str], said: str) -> None:
    assert said in run(*words, exit_code=1)
