"""Recognisers of personal data: what has a valid form and checksum is masked, and nothing else."""

import time

import pytest

from worker.dataset.personal_data import Masker

FOUND = {
    "email": ["ada.lovelace+x@mail.example.co.uk", "ünal@örnek.com"],
    "phone": ["+49 30 901820", "0049-30-901820", "(415) 555-0132", "415-555-0132", "030/9018 2000"],
    "iban": ["DE89 3704 0044 0532 0130 00", "GB82WEST12345698765432", "NO9386011117947"],
    "card": ["4111 1111 1111 1111", "5500-0055-5555-5559", "378282246310005"],
    "ip_address": ["203.0.113.9", "2001:db8::8a2e:370:7334"],
    "secret": [
        "sk-proj-abcdefghijklmnopqrstuvwx",
        "ghp_" + "a1B2" * 9,
        "AKIAIOSFODNN7EXAMPLE",
        "xoxb-123456789012-abcdefABCDEF",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N",
        "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nIBAAKC\n-----END RSA PRIVATE KEY-----",
    ],
}
LEFT = [
    "the year 2026-11-28 at 12:30:45, page 1234 of 5678",
    "order 4111 1111 1111 1112 with one wrong digit",
    "DE89 3704 0044 0532 0130 01 is no IBAN",
    "version 1.2.3.4.5, ratio 3.14159265358979, 999.1.1.1 and 127.0.0.1",
    "a@b, user@host, @handle and name@",
    "the time is 10:20:30, and std::vector<int> is a type",
    "sk-short and risk-management-of-a-very-long-name",
    "call 110 or 42, room 030-1",
    "0000 0000 0000 0000",
]


@pytest.mark.parametrize(
    ("kind", "text"), [(k, text) for k, texts in FOUND.items() for text in texts]
)
def test_a_value_is_masked_by_its_kind_alone(kind: str, text: str) -> None:
    masker = Masker()
    assert masker.mask(f"Here: {text}, or so.") == f"Here: [{kind.upper()}_1], or so."
    assert masker.counts == {kind: 1}
    others = Masker([name for name in FOUND if name != kind])  # type: ignore[misc]  # all are kinds
    if kind not in ("iban", "card", "phone"):  # their digits can look like each other's
        assert others.mask(text) == text


@pytest.mark.parametrize("text", LEFT)
def test_text_that_only_resembles_a_value_is_left_alone(text: str) -> None:
    assert Masker().mask(text) == text


def test_placeholders_are_stable_within_a_conversation_and_distinct() -> None:
    masker = Masker()
    assert masker.mask("a@x.org wrote to b@x.org") == "[EMAIL_1] wrote to [EMAIL_2]"
    assert masker.mask("B@X.org answered +49 30 901820") == "[EMAIL_2] answered [PHONE_1]"
    assert masker.mask("call +49 (30) 901820 or +49 30 901821") == "call [PHONE_1] or [PHONE_2]"
    assert masker.counts == {"email": 3, "phone": 3}
    assert Masker().mask("b@x.org") == "[EMAIL_1]"


def test_masking_a_masked_text_changes_nothing() -> None:
    text = "; ".join(value for values in FOUND.values() for value in values)
    once = Masker().mask(text)
    assert once != text
    assert Masker().mask(once) == once


@pytest.mark.parametrize(
    "unit",
    ["a", "1", "1 ", "1-", "+1", "a.", "a@", "::", "(12)", "AB12", "eyJ", "sk-", "-----BEGIN "],
)
def test_hostile_text_takes_time_in_proportion_to_its_length(unit: str) -> None:
    text = unit * (200_000 // len(unit))
    began = time.process_time()
    Masker().mask(text)
    assert time.process_time() - began < 5
