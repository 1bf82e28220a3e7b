"""Data sets from records: their rows, the side of each row, and the report."""

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from app.contracts.datasets import DatasetOptions
from app.services.fine_tuning.chat_rows import RowDetails
from app.services.training_rows import check_row
from tests.stored_rows import record
from worker.dataset.build import DatasetBuild
from worker.dataset.drafts import Records
from worker.dataset.near_duplicates import jaccard, normalised, shingles
from worker.distill.data.chat_rows import turns_of
from worker.errors import EmptyDataset
from worker.protocol.dataset_spec import DatasetSpec
from worker.protocol.run_lines import DatasetLine, RunLine

Json = dict[str, Any]  # Any: JSON
LOOKUP = {
    "type": "function",
    "function": {"name": "lookup", "parameters": {"type": "object", "properties": {}}},
}
TRAIN_ALL = {"validation_fraction": 0.0, "test_fraction": 0.0}
SUBJECTS = [
    "lanterns", "the harbour", "old maps", "sheep dogs", "clock towers", "glass blowing", "river ice",
    "bread ovens", "night trains", "wool felt", "salt mines", "paper kites", "roof slates", "bee hives",
    "copper pots", "field mice", "stone bridges", "oak barrels", "candle wax", "ship ropes",
]  # fmt: skip


def question(number: int) -> str:
    return f"{number * 7919 % 9973} facts about {SUBJECTS[number % 20]} and {SUBJECTS[number // 20 % 20]}"


def asked(text: str) -> list[Json]:
    return [{"role": "user", "content": text}]


def called(call_id: str, name: str, arguments: str) -> Json:
    """A message that calls one tool."""
    function = {"name": name, "arguments": arguments}
    call = {"id": call_id, "type": "function", "function": function}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def result(call_id: str, content: str) -> Json:
    return {"role": "tool", "content": content, "tool_call_id": call_id}


def calling_record(number: int, answer: Json, **changes: Any) -> Json:
    """A stored completion whose answer calls a tool."""
    columns = record(number, request=json.dumps({"model": "tiny", "tools": [LOOKUP]}), **changes)
    completion = json.loads(columns["completion"])
    completion["choices"][0] |= {"message": answer, "finish_reason": "tool_calls"}
    return columns | {"completion": json.dumps(completion)}


class BuiltDataset:
    """The report and the files of one build."""

    def __init__(self, folder: Path, line: DatasetLine) -> None:
        self.report = line.report
        self.files = {file.side: file for file in line.files}
        self.rows: dict[str, list[list[Json]]] = {}
        self.tools: dict[str, list[list[Json] | None]] = {}
        for side, file in self.files.items():
            lines = (folder / file.name).read_bytes().splitlines()
            assert len(lines) == file.num_rows == self.report["sides"][side]["num_rows"]
            assert max(map(len, lines)) == file.max_row_bytes
            rows = [json.loads(line) for line in lines]
            assert {check_row(row, RowDetails()) for row in rows} == {"chat"}
            self.rows[side] = [row["messages"] for row in rows]
            self.tools[side] = [row.get("tools") for row in rows]

    def contents(self, side: str = "training") -> list[str]:
        return [message["content"] for row in self.rows[side] for message in row]


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., BuiltDataset]:
    def do_build(records: list[Json], **options: Any) -> BuiltDataset:
        path = tmp_path / "records.jsonl"
        path.write_text("".join(json.dumps(exported(columns)) + "\n" for columns in records))
        max_row_bytes = options.pop("max_row_bytes", 100_000)
        spec = DatasetSpec(
            records_path=path,
            options=DatasetOptions.model_validate(options),
            max_row_bytes=max_row_bytes,
        )
        lines: list[RunLine] = []
        with closing(Records(path)) as reader:
            DatasetBuild(spec, reader, lines.append).run(tmp_path)
        assert isinstance(lines[-1], DatasetLine)
        return BuiltDataset(tmp_path, lines[-1])

    return do_build


def exported(columns: Json) -> Json:
    """The record as `worker.jobs.dataset_job` exports it."""
    texts = {name: json.loads(columns[name]) for name in ("messages", "request", "completion")}
    names = ("id", "model", "created_at", "prompt_tokens", "completion_tokens")
    return {name: columns[name] for name in names} | texts


def test_rows_are_the_conversations_and_the_report_counts_them(
    build: Callable[..., BuiltDataset],
) -> None:
    records = [record(n, question=question(n), model=f"m{n % 2}") for n in range(100)]
    dataset = build(records)
    assert set(dataset.rows) == {"training", "validation", "test"}
    assert sum(map(len, dataset.rows.values())) == dataset.report["num_rows"]
    row = dataset.rows["training"][0]
    assert [message["role"] for message in row] == ["user", "assistant"]
    assert row[0]["content"] in {question(n) for n in range(100)}
    report = dataset.report
    assert report["num_completions"] == 100
    assert sum(report["left_out"].values()) + report["num_rows"] == 100
    assert sum(report["models"].values()) == report["num_rows"]
    assert report["sides"]["training"]["tokens"] == 12 * len(dataset.rows["training"])
    assert report["first_created_at"] < report["last_created_at"]


def test_each_reason_to_leave_an_answer_out_is_counted(build: Callable[..., BuiltDataset]) -> None:
    half_a_call = [*asked("q"), called("x", "lookup", '{"name": "an'), result("x", "r")]
    half_done = {"role": "assistant", "content": "wait", "function_call": {"name": "f"}}
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]
    records = [
        record(0, question=question(0)),
        record(1, question=question(0).upper(), answer="It means that  the number is 0."),
        record(2, question=question(0), answer="It means that the number is 0."),
        record(3, question=question(3), finish_reason="length"),
        record(4, messages=half_a_call),
        record(5, messages=image),
        calling_record(11, called("x", "lookup", '{"a":' * 300 + "1" + "}" * 300)),
        record(12, messages=[*asked("q"), {**result("x", "r"), "role": "function"}]),
        record(13, messages=[*asked("q"), half_done, *asked("r")]),
        record(6, question=question(6), answer="no"),
        record(7, question=question(7), answer="   "),
        record(9, messages=[{"role": "system", "content": "s"}]),
        record(10, question=question(10), answer="word " * 400),
    ]
    dataset = build(records, **TRAIN_ALL, min_answer_characters=5, max_row_bytes=1000)
    assert dataset.report["left_out"] == {
        "near_duplicate": 1,
        "exact_duplicate": 1,
        "finish_reason": 1,
        "invalid_tool_call": 2,
        "function_call": 2,
        "not_text": 1,
        "short_answer": 1,
        "empty_message": 1,
        "no_user_message": 1,
        "too_long": 1,
    }
    assert dataset.report["num_rows"] == 1


def test_a_conversation_is_one_row_and_only_stored_answers_are_learned(
    build: Callable[..., BuiltDataset],
) -> None:
    def user(text: str) -> Json:
        return {"role": "user", "content": text}

    def assistant(text: str) -> Json:
        return {"role": "assistant", "content": text}

    foreign = [user("one"), assistant("not stored"), user("two")]
    longer = [*foreign, assistant("second answer"), user("three")]
    dataset = build(
        [
            record(2, messages=longer, answer="third answer"),
            record(1, messages=foreign, answer="second answer"),
        ],
        **TRAIN_ALL,
    )
    (row,) = dataset.rows["training"]
    assert [message.get("weight") for message in row] == [None, 0, None, None, None, None]
    assert row[-1]["content"] == "third answer"
    assert dataset.report["left_out"] == {"continued": 1}


def test_a_loop_with_tools_is_one_row_that_a_student_can_learn(
    build: Callable[..., BuiltDataset],
) -> None:
    first = asked("Who owns the lantern?")
    call = called("call_1", "lookup", '{"thing": "lantern", "owners": [1]}')
    loop = [*first, call, result("call_1", '{"owner": "Ada"}')]
    offers = json.dumps({"model": "tiny", "tools": [LOOKUP]})
    dataset = build(
        [
            record(2, messages=loop, answer="Ada owns it.", request=offers),
            calling_record(1, call, messages=first),
        ],
        **TRAIN_ALL,
    )
    (row,) = dataset.rows["training"]
    assert [message["role"] for message in row] == ["user", "assistant", "tool", "assistant"]
    assert "weight" not in row[1]  # its answer was stored, too
    (rendered,) = turns_of(row)[1]["tool_calls"]
    assert rendered["function"]["arguments"] == {"thing": "lantern", "owners": [1]}
    assert row[2]["tool_call_id"] == rendered["id"] == "call_1"
    assert dataset.tools["training"] == [[LOOKUP]]
    assert dataset.report["left_out"] == {"continued": 1}


def test_equal_calls_are_duplicates_whatever_their_ids_and_spaces(
    build: Callable[..., BuiltDataset],
) -> None:
    def stored(number: int, call_id: str, arguments: str) -> Json:
        answer = called(call_id, "lookup", arguments)
        return calling_record(number, answer, messages=asked("Who owns the lantern?"))

    records = [
        stored(3, "a", '{"thing":"lantern","n":1}'),
        stored(2, "b", '{"n": 1, "thing": "lantern"}'),
        stored(1, "c", '{"thing": "lantern", "n": 2}'),
    ]
    dataset = build(records, **TRAIN_ALL, near_duplicates=None)
    assert dataset.report["left_out"] == {"exact_duplicate": 1}
    assert len(dataset.rows["training"]) == 2


def test_arguments_are_masked_and_stay_json(build: Callable[..., BuiltDataset]) -> None:
    arguments = {
        "ada@example.org": None,
        "to": "ada@example.org",
        "card": 4111111111111111,
        "copies": 2,
        "urgent": True,
    }
    call = called("call_1", "lookup", json.dumps({"mail": [arguments]}))
    dataset = build(
        [calling_record(1, call, messages=asked("Write to ada@example.org, please"))],
        **TRAIN_ALL,
        mask=["email", "card"],
    )
    (row,) = dataset.rows["training"]
    (function,) = [call["function"] for call in row[-1]["tool_calls"]]
    assert json.loads(function["arguments"]) == {
        "mail": [
            {"[EMAIL_1]": None, "to": "[EMAIL_1]", "card": "[CARD_1]", "copies": 2, "urgent": True}
        ]
    }
    assert row[0]["content"] == "Write to [EMAIL_1], please"
    assert dataset.report["masked"] == {"email": 3, "card": 1}


def test_each_choice_of_an_answer_can_become_a_row(build: Callable[..., BuiltDataset]) -> None:
    columns = record(0, question=question(0))
    completion = json.loads(columns["completion"])
    second = json.loads(json.dumps(completion["choices"][0]))
    second["message"]["content"] = (
        "Entirely other words, of which the first answer has none at all."
    )
    completion["choices"].append(second)
    dataset = build([columns | {"completion": json.dumps(completion)}], **TRAIN_ALL)
    assert len(dataset.rows["training"]) == 2


def test_long_shared_instructions_do_not_make_conversations_similar(
    build: Callable[..., BuiltDataset],
) -> None:
    rules = " ".join(f"Rule {n}: obey {n * 7919 % 99_991}." for n in range(100))
    system = {"role": "system", "content": rules}
    records = [
        record(
            n, messages=[system, {"role": "user", "content": question(n)}], answer=question(n + 50)
        )
        for n in range(10)
    ]
    dataset = build(records, **TRAIN_ALL)
    assert len(dataset.rows["training"]) == 10


def test_masked_rows_hold_placeholders_and_may_become_duplicates(
    build: Callable[..., BuiltDataset],
) -> None:
    records = [
        record(
            n, question=f"Write to user{n * 7919}@example.org at once, please", answer="Done, sent."
        )
        for n in range(3)
    ]
    plain = build(records, **TRAIN_ALL, near_duplicates=1.0)
    assert (len(plain.rows["training"]), plain.report["mask_version"]) == (3, None)
    dataset = build(records, **TRAIN_ALL, near_duplicates=1.0, mask=["email", "phone"])
    assert dataset.contents() == ["Write to [EMAIL_1] at once, please", "Done, sent."]
    assert dataset.report["masked"] == {"email": 1, "phone": 0}
    assert dataset.report["left_out"] == {"near_duplicate": 2}


def test_similar_questions_are_on_one_side_and_rows_keep_their_side_as_data_grows(
    build: Callable[..., BuiltDataset],
) -> None:
    records = [
        record(
            n,
            question=f"{question(n // 3)} {'please' * (n % 3)}",
            answer=f"{question(n + 9)} {n}" * 3,
        )
        for n in range(240)
    ]
    small = build(records[120:], validation_fraction=0.2, test_fraction=0.2)
    large = build(records, validation_fraction=0.2, test_fraction=0.2)

    def sides(dataset: BuiltDataset) -> dict[str, str]:
        return {row[-1]["content"]: side for side, rows in dataset.rows.items() for row in rows}

    before, after = sides(small), sides(large)
    both = before.keys() & after.keys()
    assert len(both) > 50
    assert {text for text in both if before[text] != after[text]} == set()
    questions = {
        side: [shingles(normalised(row[0]["content"])) for row in rows]
        for side, rows in large.rows.items()
    }
    assert large.report["left_out"]["other_side"] > 0
    for side in ("validation", "test"):
        for held_out in questions[side]:
            assert all(jaccard(held_out, other) < 0.8 for other in questions["training"])


def test_a_build_is_the_same_every_time(build: Callable[..., BuiltDataset]) -> None:
    records = [record(n, question=question(n % 30)) for n in range(60)]
    one, other = build(records, mask=["email"]), build(records, mask=["email"])
    assert (one.rows, one.report) == (other.rows, other.report)


def test_without_a_training_row_the_reasons_are_given(build: Callable[..., BuiltDataset]) -> None:
    with pytest.raises(EmptyDataset, match="left out: 2 finish_reason"):
        build([record(n, question=question(n), finish_reason="length") for n in range(2)])
