import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from worker.distill.data.rows import (
    Encoder,
    Row,
    question_key,
    read_rows,
    split_rows,
    without_questions_of,
)
from worker.errors import InvalidTrainingFile

WriteRows = Callable[..., Path]
CHAT = {
    "messages": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Who keeps the house?"},
        {"role": "assistant", "content": "The student."},
        {"role": "user", "content": "And the jar?"},
        {"role": "assistant", "content": "The still."},
    ]
}
FORGETFUL_TEMPLATE = (  # renders an assistant's turn differently once another turn follows, as reasoning models' do
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and not loop.last %}[cut]{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def encoder(tokenizer: PreTrainedTokenizerBase) -> Encoder:
    return Encoder(tokenizer, max_tokens=256)


def targets(encoder: Encoder, row: Row) -> list[str]:
    example = encoder.encode(row)
    return [encoder.tokenizer.decode(example.token_ids[start:end]) for start, end in example.spans]


def test_every_assistant_turn_is_a_target_and_ends_with_the_end_token(
    encoder: Encoder, write_rows: WriteRows
) -> None:
    (row,) = read_rows(write_rows([CHAT]))
    assert targets(encoder, row) == ["The student.<|im_end|>", "The still.<|im_end|>"]


def test_an_answer_of_weight_0_is_read_and_not_learned_from(
    encoder: Encoder, write_rows: WriteRows
) -> None:
    silent, told = [turn | {"weight": 0} for turn in CHAT["messages"][:-1]], CHAT["messages"][-1]
    weighted, plain = read_rows(write_rows([{"messages": [*silent, told]}, CHAT]))
    assert encoder.encode(weighted).token_ids == encoder.encode(plain).token_ids
    assert targets(encoder, weighted) == ["The still.<|im_end|>"]


def test_a_conversation_that_waits_for_an_answer_has_no_targets_yet(
    encoder: Encoder, write_rows: WriteRows
) -> None:
    """Else the teacher would not be asked, and the row's earlier answers be learned instead."""
    (row,) = read_rows(write_rows([CHAT]))
    waiting, answered = encoder.encode(row.question), encoder.encode(row)
    assert waiting.spans == ()
    assert waiting.prompt_ids == answered.prompt_ids
    assert waiting.answered(answered.completion_ids).spans == answered.spans[-1:]


def test_a_prompt_is_what_the_chat_template_gives_a_server(
    encoder: Encoder, write_rows: WriteRows
) -> None:
    (row,) = read_rows(write_rows([CHAT]))
    served = encoder.tokenizer.apply_chat_template(
        CHAT["messages"][:-1], tokenize=False, add_generation_prompt=True
    )
    assert encoder.tokenizer.decode(encoder.encode(row).prompt_ids) == served


def test_prompt_and_completion_are_a_users_and_an_assistants_turn(
    encoder: Encoder, write_rows: WriteRows
) -> None:
    short = {"prompt": "Who?", "completion": "The student."}
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The student."}]
    short_row, long_row = read_rows(write_rows([short, {"messages": turns}]))
    assert encoder.encode(short_row).token_ids == encoder.encode(long_row).token_ids


def test_without_a_chat_template_a_prompt_stays_plain(
    encoder: Encoder, write_rows: WriteRows
) -> None:
    encoder.tokenizer.chat_template = None
    (row,) = read_rows(write_rows([{"prompt": "Who? ", "completion": "The student."}]))
    assert encoder.tokenizer.decode(encoder.encode(row).token_ids) == "Who? The student.<|im_end|>"


def test_a_conversation_needs_a_chat_template(encoder: Encoder, write_rows: WriteRows) -> None:
    encoder.tokenizer.chat_template = None
    (row,) = read_rows(write_rows([CHAT]))
    with pytest.raises(InvalidTrainingFile, match="no chat template"):
        encoder.encode(row)


def test_a_template_that_rewrites_earlier_turns_leaves_the_last_answer_as_the_target(
    encoder: Encoder, write_rows: WriteRows
) -> None:
    encoder.tokenizer.chat_template = FORGETFUL_TEMPLATE
    (row,) = read_rows(write_rows([CHAT]))
    assert targets(encoder, row) == ["The still.<|im_end|>"]
    assert "[cut]" in encoder.tokenizer.decode(encoder.encode(row).prompt_ids)


def test_a_template_that_refuses_a_row_is_reported_with_the_line(
    encoder: Encoder, write_rows: WriteRows
) -> None:
    encoder.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    rows = read_rows(write_rows([{"prompt": "a"}, {"prompt": "b"}]))
    with pytest.raises(InvalidTrainingFile, match=r"line 2 .*roles must alternate"):
        encoder.encode(rows[1])


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "takes too long",
        ),
        (
            "{% set all = namespace(text='eight...') %}"
            "{% for i in range(60) %}{% set all.text = all.text + all.text %}{% endfor %}",
            "MemoryError",
        ),
        ("{{ 1 + messages[0].content }}", "unsupported operand"),
    ],
)
def test_a_strangers_template_cannot_hold_up_a_training(
    encoder: Encoder,
    write_rows: WriteRows,
    monkeypatch: pytest.MonkeyPatch,
    template: str,
    reason: str,
) -> None:
    monkeypatch.setattr("worker.models.template_limits.CPU_SECONDS", 0.3)
    encoder.tokenizer.chat_template = template
    (row,) = read_rows(write_rows([{"prompt": "a"}]))
    with pytest.raises(InvalidTrainingFile, match=f"line 1 .*{reason}"):
        encoder.encode(row)


def test_a_prompt_alone_waits_for_an_answer(encoder: Encoder, write_rows: WriteRows) -> None:
    (row,) = read_rows(write_rows([{"prompt": "Who?"}]))
    example = encoder.encode(row)
    assert example.spans == ()
    answered = example.answered([7, 8])
    assert (answered.prompt_ids, answered.completion_ids) == (example.token_ids, (7, 8))


def test_all_of_a_plain_text_but_its_first_token_is_a_target(
    encoder: Encoder, write_rows: WriteRows
) -> None:
    (row,) = read_rows(write_rows([{"text": "The still is warm"}]))
    example = encoder.encode(row)
    assert example.target_positions == list(range(1, len(example.token_ids)))
    assert encoder.tokenizer.decode(example.token_ids) == "The still is warm<|im_end|>"


def test_a_row_that_is_too_long_is_refused_by_its_line(
    tokenizer: PreTrainedTokenizerBase, write_rows: WriteRows
) -> None:
    rows = read_rows(write_rows([{"text": "a"}, {"text": "lamp " * 50}]))
    with pytest.raises(
        InvalidTrainingFile, match=r"line 2 has \d+ tokens, but a sequence has at most 20"
    ):
        Encoder(tokenizer, max_tokens=20).encode(rows[1])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": 3},
        {"messages": [{"role": "user", "content": None}]},
        {"other": ""},
        {"messages": []},
    ],
)
def test_a_row_of_no_known_form_is_refused_by_its_line(
    write_rows: WriteRows, row: dict[str, Any]
) -> None:
    with pytest.raises(InvalidTrainingFile, match="line 2"):
        read_rows(write_rows([{"text": "fine"}, row]))


def test_held_out_rows_do_not_depend_on_the_order_of_the_file() -> None:
    rows = [Row(i, text=f"sentence {i}") for i in range(100)]
    shuffled = random.Random(1).sample(rows, k=len(rows))
    one, other = split_rows(rows)[1], split_rows(shuffled)[1]
    assert len(one) == 10
    assert {row.text for row in one} == {row.text for row in other}


def test_rows_that_ask_the_same_fall_on_the_same_side() -> None:
    rows = [
        Row(
            i, ({"role": "user", "content": f"q{i % 7}"}, {"role": "assistant", "content": f"a{i}"})
        )
        for i in range(70)
    ]
    train, valid = split_rows(rows)
    assert len(train) + len(valid) == 70
    assert not {question_key(row) for row in train} & {question_key(row) for row in valid}


def test_a_single_question_is_on_both_sides() -> None:
    rows = [Row(1, text="alone")]
    assert split_rows(rows) == (rows, rows)


def test_training_rows_that_a_validation_row_asks_are_left_out() -> None:
    question = {"role": "user", "content": "q"}
    train = [Row(1, (question, {"role": "assistant", "content": "a"})), Row(2, text="other")]
    assert without_questions_of(train, [Row(1, (question,))]) == [train[1]]
