"""What the API counts of a row at submission is what the run makes of it, with and without a chat template."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from app.services.row_lengths import NO_TEMPLATE, Reader, count_tokens
from app.services.training_rows import UNANSWERED
from worker.distill.data.rows import Encoder, Example, read_rows
from worker.models.model_facts import model_facts

USER = {"role": "user", "content": "What is a lantern?"}
ANSWER = {"role": "assistant", "content": "A lamp with a case."}
ROWS: list[tuple[str, dict[str, Any]]] = [  # Any: JSON rows of several shapes
    ("prompt", {"prompt": "Who keeps the house when the master is away?"}),
    (
        "prompt_completion",
        {"prompt": "Who keeps the house?", "completion": "The student does, 蒸馏."},
    ),
    ("input", {"input": "Who keeps the house when the master is away?"}),
    ("input_target", {"input": "Who keeps the house?", "target": "The student does, 蒸馏."}),
    ("text", {"text": "The still is warm and the spirit runs clear."}),
    ("chat", {"messages": [USER, ANSWER]}),
    (
        "chat",
        {"messages": [{"role": "system", "content": "Be brief."}, USER, ANSWER, USER, ANSWER]},
    ),
    ("chat_prompt", {"messages": [USER, ANSWER, USER]}),
    ("chat_prompt", {"messages": [{"role": "system", "content": "Be brief."}, USER]}),
]
CASES = [
    (kind, row, has_template)
    for kind, row in ROWS
    for has_template in (True, False)
    if has_template or "messages" not in row  # chats need one
]


@pytest.mark.parametrize(("row_format", "row", "has_template"), CASES)
def test_the_api_and_the_run_count_the_same_tokens(
    row_format: str, row: dict[str, Any], has_template: bool, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    facts = model_facts(tiny_llama_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    if not has_template:
        facts = facts.model_copy(update={"chat_cost": None})
        tokenizer.chat_template = None
    example = encoded(row, tmp_path, Encoder(tokenizer, max_tokens=256))
    is_answered = row_format not in UNANSWERED
    reader = Reader("x", facts.family, facts.chat_cost or NO_TEMPLATE)
    counted = count_tokens(row, backend(tiny_llama_dir), reader, is_answered=is_answered)
    assert counted == len(example.token_ids) + (not is_answered)


@pytest.mark.parametrize("family", ["t5", "bert2bert"])
@pytest.mark.parametrize(
    ("row_format", "row"), [case for case in ROWS if "messages" not in case[1]]
)
def test_the_longer_of_an_encoder_decoders_sequences_counts(
    family: str,
    row_format: str,
    row: dict[str, Any],
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    folder: Path = request.getfixturevalue(f"tiny_{family}_dir")
    is_answered = row_format not in UNANSWERED
    encoder = Encoder(
        AutoTokenizer.from_pretrained(folder), max_tokens=256, shape="seq2seq", start_id=0
    )
    example = encoded(row, tmp_path, encoder)
    counted = count_tokens(row, backend(folder), Reader("x", "seq2seq"), is_answered=is_answered)
    longest = max(len(example.source_ids), len(example.token_ids) + (not is_answered))
    # Of plain text its own end token is counted, too, before the text is cut in two.
    assert 0 <= counted - longest <= (row_format == "text")


def test_a_student_with_berts_tokenizer_keeps_what_that_puts_around_a_prompt(
    tiny_bert_dir: Path, tmp_path: Path
) -> None:
    row = {"prompt": "Who keeps the house?", "completion": "The student."}
    example = encoded(
        row, tmp_path, Encoder(AutoTokenizer.from_pretrained(tiny_bert_dir), max_tokens=256)
    )
    counted = count_tokens(row, backend(tiny_bert_dir), Reader("x", "causal"), is_answered=True)
    assert counted == len(example.token_ids)


def backend(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def encoded(row: dict[str, Any], folder: Path, encoder: Encoder) -> Example:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    return encoder.encode(read_rows(path)[0])
