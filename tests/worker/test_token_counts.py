"""What the API counts of a row at submission is what the run makes of it, with and without a chat template."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from app.contracts import ArtifactRef, DistillationJob
from app.db.tables import File
from app.distillation import Distillation
from app.services.submission import Plan, count_tokens
from worker.distill.data import Encoder, read_rows
from worker.model_facts import model_facts

USER = {"role": "user", "content": "What is a lantern?"}
ANSWER = {"role": "assistant", "content": "A lamp with a case."}
ROWS: list[tuple[str, dict[str, Any]]] = [  # Any: JSON rows of several shapes
    ("prompt", {"prompt": "Who keeps the house when the master is away?"}),
    ("prompt_completion", {"prompt": "Who keeps the house?", "completion": "The student does, 蒸馏."}),
    ("text", {"text": "The still is warm and the spirit runs clear."}),
    ("chat", {"messages": [USER, ANSWER]}),
    ("chat", {"messages": [{"role": "system", "content": "Be brief."}, USER, ANSWER, USER, ANSWER]}),
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
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    example = Encoder(tokenizer, max_tokens=256).encode(read_rows(path)[0])

    is_answered = row_format not in {"prompt", "chat_prompt"}
    block = Distillation.model_validate(
        {"teacher": "t", "data": {"completions": "dataset" if is_answered else "teacher"}}
    )
    nothing = ArtifactRef(key="x", bytes=1)
    spec = DistillationJob(
        distillation=block, teacher=nothing, start=nothing, training_file=nothing, output_model="s", seed=0
    )
    plan = Plan(spec, facts, facts, File(format=row_format), None, 256)
    counted = count_tokens(plan, row, Tokenizer.from_file(str(tiny_llama_dir / "tokenizer.json")))
    assert counted == len(example.token_ids) + (not is_answered)
