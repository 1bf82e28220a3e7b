import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.worker.memory_sink import MemorySink
from worker.distill.pipeline import distil
from worker.distill.students.recipe import load_model
from worker.distill.training.checkpoint import load_state
from worker.distill.training.trainer import Stopped
from worker.errors import InvalidTrainingFile, TokenizerMismatch
from worker.protocol.run_lines import CheckpointLine, MessageLine, ProgressLine, RunLine, StageLine
from worker.protocol.run_spec import RunSpec
from worker.train import EngineSampler

MakeSpec = Callable[..., RunSpec]
Run = Callable[..., MemorySink]
WriteRows = Callable[..., Path]
QUESTIONS = [{"prompt": f"Who keeps house number {i}?"} for i in range(100)]
SHORT = {"data": {"max_new_tokens": 8}}


@pytest.fixture
def asking(make_spec: MakeSpec, write_rows: WriteRows) -> RunSpec:
    """A run whose completions the teacher writes."""
    return make_spec(SHORT, spec={"training_path": write_rows(QUESTIONS)}, n_epochs=1)


def turns(*contents: str) -> list[dict[str, str]]:
    return [
        {"role": ("user", "assistant")[i % 2], "content": content}
        for i, content in enumerate(contents)
    ]


def stages(sink: MemorySink) -> list[str]:
    return [line.name for line in sink.lines if isinstance(line, StageLine)]


def messages(sink: MemorySink) -> list[str]:
    return [line.message for line in sink.lines if isinstance(line, MessageLine)]


def test_prompts_are_answered_by_the_teacher_once(run: Run, asking: RunSpec) -> None:
    first = run(asking)
    assert stages(first) == [
        "loading_models",
        "generating_teacher_data",
        "storing_teacher_outputs",
        "training",
        "evaluating",
        "exporting",
    ]
    (path,) = (asking.cache_dir / "answers").glob("*.jsonl")
    before = path.read_bytes()
    second = run(asking, out="second")
    assert path.read_bytes() == before
    asked = [line for line in second.lines if isinstance(line, ProgressLine) and line.rows_total]
    assert asked == []


def test_the_teacher_does_not_read_its_own_answers_again(asking: RunSpec, tmp_path: Path) -> None:
    def result(out: str) -> dict[str, Any]:
        return distil(asking, tmp_path / out, MemorySink(), EngineSampler, lambda: False).result

    kept = result("first")
    assert (kept["num_teacher_rows_computed"], kept["teacher_passes"]) == (0, 0.0)
    # the states have gone with the run that generated the answers
    shutil.rmtree(asking.cache_dir / "teacher")
    read = result("second")
    assert (read["num_teacher_rows_computed"], read["teacher_passes"]) == (100, 1.0)
    for name in ("kl", "agreement", "perplexity"):
        # the same rows up to rounding
        assert read["student"][name] == pytest.approx(kept["student"][name], rel=1e-3)


def test_a_resumed_run_warns_if_kept_rows_are_gone(
    run: Run, asking: RunSpec, tmp_path: Path
) -> None:
    run(asking)
    newest = max(
        (tmp_path / "out").glob("step-*"), key=lambda path: int(path.name.removeprefix("step-"))
    )
    resumed = asking.model_copy(update={"resume_dir": newest})
    assert not any("lacks rows" in message for message in messages(run(resumed, out="second")))
    shutil.rmtree(asking.cache_dir)
    assert any("lacks rows" in message for message in messages(run(resumed, out="third")))


def test_answers_that_were_cut_are_counted(run: Run, asking: RunSpec) -> None:
    (warning,) = run(asking).warnings
    assert "of 100 answers did not end within 8 tokens" in warning.message


def test_a_run_stopped_while_the_teacher_answers_keeps_the_answers(
    run: Run, asking: RunSpec
) -> None:
    def is_asked_to_stop() -> bool:
        return any((asking.cache_dir / "answers").glob("*.jsonl"))

    with pytest.raises(Stopped) as stopped:
        run(asking, should_stop=is_asked_to_stop)
    assert stopped.value.step == 0
    (path,) = (asking.cache_dir / "answers").glob("*.jsonl")
    assert 1 <= len(path.read_text().split()) < 100


def test_a_checkpoint_brings_the_answers_along(run: Run, asking: RunSpec, tmp_path: Path) -> None:
    run(asking)
    shutil.rmtree(asking.cache_dir)
    newest = max(
        (tmp_path / "out").glob("step-*"), key=lambda path: int(path.name.removeprefix("step-"))
    )
    again = run(asking.model_copy(update={"resume_dir": newest}), out="second")
    assert not [line for line in again.lines if isinstance(line, ProgressLine) and line.rows_total]
    assert not any("inputs have changed" in message for message in messages(again))


def test_the_teacher_answers_in_place_of_the_data_set_if_asked(
    run: Run, make_spec: MakeSpec
) -> None:
    sink = run(make_spec({"data": {"max_new_tokens": 4, "completions": "teacher"}}, n_epochs=1))
    assert "generating_teacher_data" in stages(sink)


@pytest.mark.parametrize(
    ("rows", "completions", "message"),
    [
        (
            [{"prompt": "a", "completion": "b"}, {"prompt": "c"}],
            "dataset",
            "line 2 has no completion",
        ),
        ([{"text": "the still"}, {"text": "the jar"}], "teacher", "line . is plain text"),
    ],
)
def test_rows_that_do_not_fit_where_completions_come_from_are_refused(
    run: Run,
    make_spec: MakeSpec,
    write_rows: WriteRows,
    rows: list[Any],
    completions: str,
    message: str,
) -> None:
    spec = make_spec(
        {"data": {"completions": completions}}, spec={"training_path": write_rows(rows)}
    )
    with pytest.raises(InvalidTrainingFile, match=message):
        run(spec)


def test_plain_text_is_learnt_from(run: Run, make_spec: MakeSpec, write_rows: WriteRows) -> None:
    rows = [{"text": f"The still number {i} is warm and the spirit runs clear."} for i in range(20)]
    block = {"evaluation": {"metrics": ["perplexity", "rouge_l"], "num_samples": 1}, **SHORT}
    assert (
        stages(run(make_spec(block, spec={"training_path": write_rows(rows)}, n_epochs=1)))[-1]
        == "exporting"
    )


def test_a_validation_file_is_held_out_and_its_questions_are_not_trained_on(
    tmp_path: Path, make_spec: MakeSpec, write_rows: WriteRows, answered_rows: list[dict[str, str]]
) -> None:
    held_out = write_rows(
        [*answered_rows[:3], {"prompt": "Other?", "completion": "Yes."}], "valid.jsonl"
    )
    sink = MemorySink()
    spec = make_spec(spec={"validation_path": held_out}, n_epochs=1)
    result = distil(spec, tmp_path / "out", sink, EngineSampler, lambda: False).result
    assert (result["num_train_rows"], result["num_validation_rows"]) == (37, 4)
    assert (result["num_shared_validation_rows"], result["num_train_rows_left_out"]) == (3, 3)
    assert any("3 training rows" in message for message in messages(sink))
    assert (result["judged_on"], result["is_chosen_on_judged_rows"]) == ("validation", True)


@pytest.mark.parametrize("has_answers", [False, True])
def test_held_out_rows_keep_their_answers_if_the_training_rows_have_none(
    tmp_path: Path, make_spec: MakeSpec, write_rows: WriteRows, *, has_answers: bool
) -> None:
    rows = [{**row, "completion": "Jar."} if has_answers else row for row in QUESTIONS]
    held_out = write_rows(
        [{"prompt": f"Other {i}?", "completion": "Yes."} for i in range(4)], "valid.jsonl"
    )
    tests = write_rows(
        [{"prompt": f"Third {i}?", "completion": "No."} for i in range(4)], "test.jsonl"
    )
    paths = {"training_path": write_rows(rows), "validation_path": held_out, "test_path": tests}
    spec = make_spec(
        {"data": {"completions": "teacher", "max_new_tokens": 4}}, spec=paths, n_epochs=1
    )
    distil(spec, tmp_path / "out", MemorySink(), EngineSampler, lambda: False)
    (answers,) = (spec.cache_dir / "answers").glob("*.jsonl")
    assert len(answers.read_text().split()) == len(rows) + has_answers * 8


def test_a_test_file_decides_nothing_and_is_what_the_student_is_judged_on(
    tmp_path: Path, make_spec: MakeSpec, write_rows: WriteRows, answered_rows: list[dict[str, str]]
) -> None:
    rows = [
        *answered_rows[:1],
        *({"prompt": f"Other {i}?", "completion": f"Jar {i}."} for i in range(5)),
    ]
    judged = {"metrics": ["agreement", "rouge_l"], "num_samples": 1}
    spec = make_spec({"evaluation": judged}, n_epochs=1)
    with_test = make_spec(
        {"evaluation": {**judged, "test_file": "file-1"}},
        spec={"test_path": write_rows(rows, "test.jsonl")},
        n_epochs=1,
    )
    sink = MemorySink()
    plain = distil(spec, tmp_path / "plain", MemorySink(), EngineSampler, lambda: False).result
    tested = distil(with_test, tmp_path / "tested", sink, EngineSampler, lambda: False).result
    one, other = (tmp_path / name / "student" / "model.safetensors" for name in ("plain", "tested"))
    assert one.read_bytes() == other.read_bytes()
    (state,) = {
        load_state(
            max((tmp_path / name).glob("step-*"), key=lambda path: path.stat().st_mtime)
        ).inputs_sha256
        for name in ("plain", "tested")
    }
    assert state
    assert (tested["judged_on"], tested["is_chosen_on_judged_rows"]) == ("test", False)
    assert (tested["num_test_rows"], tested["num_shared_test_rows"]) == (6, 1)
    assert tested["validation"]["student"]["kl"] == plain["student"]["kl"]
    assert {
        tested[name]["kl"] != plain[name]["kl"] for name in ("teacher", "untrained", "student")
    } == {True}
    assert set(tested["student"]["intervals"]) == set(plain["student"]["intervals"])
    assert any("1 of 6 test rows share a question" in message for message in messages(sink))


def test_the_teacher_answers_test_rows_after_the_last_checkpoint(
    tmp_path: Path, make_spec: MakeSpec, write_rows: WriteRows
) -> None:
    tests = write_rows([{"prompt": f"Other {i}?"} for i in range(7)], "test.jsonl")
    spec = make_spec(
        SHORT, spec={"training_path": write_rows(QUESTIONS), "test_path": tests}, n_epochs=1
    )
    num_answers = []

    class Counting(MemorySink):
        def __call__(self, line: RunLine) -> None:
            super().__call__(line)
            if isinstance(line, CheckpointLine):
                (path,) = (spec.cache_dir / "answers").glob("*.jsonl")
                num_answers.append(len(path.read_text().split()))

    sink = Counting()
    result = distil(spec, tmp_path / "out", sink, EngineSampler, lambda: False).result
    assert result["num_test_rows"] == 7
    assert set(num_answers) == {100}
    assert stages(sink) == [
        "loading_models",
        "generating_teacher_data",
        "storing_teacher_outputs",
        "training",
        "evaluating",
        "exporting",
    ]
    percents = [line.percent for line in sink.lines if isinstance(line, ProgressLine)]
    assert percents == sorted(percents), "the progress must not fall back"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a" * 900, "completion": "b"}, "line 2 has"),
        ({"other": "b"}, "line 2 is not a training row"),
    ],
)
def test_a_test_row_that_cannot_be_judged_is_refused_before_the_training(
    run: Run, make_spec: MakeSpec, write_rows: WriteRows, row: dict[str, str], message: str
) -> None:
    path = write_rows([{"prompt": "c", "completion": "d"}, row], "test.jsonl")
    sink = MemorySink()
    with pytest.raises(InvalidTrainingFile, match=f"evaluation.test_file: {message}"):
        run(make_spec(spec={"test_path": path}), sink=sink)
    assert stages(sink) == ["loading_models"]


def test_a_job_of_before_keeps_its_split(
    run: Run, make_spec: MakeSpec, write_rows: WriteRows, tmp_path: Path
) -> None:
    rows = [
        {"messages": turns(f"u{i // 2}", "a", *(("u", "b") if i % 2 else ()))} for i in range(40)
    ]
    path = write_rows(rows)
    hashes = []
    for version in (1, 2):
        run(
            make_spec(spec={"training_path": path, "split_version": version}, n_epochs=1),
            out=f"v{version}",
        )
        newest = max(
            (tmp_path / f"v{version}").glob("step-*"), key=lambda path: path.stat().st_mtime
        )
        hashes.append(load_state(newest).inputs_sha256)
    assert hashes[0] != hashes[1]
    resumed = make_spec(
        spec={
            "training_path": path,
            "split_version": 1,
            "resume_dir": next((tmp_path / "v1").glob("step-*")),
        },
        n_epochs=1,
    )
    assert not any(
        "inputs have changed" in message for message in messages(run(resumed, out="resumed"))
    )


def test_logits_of_models_with_different_tokenizers_are_not_compared(
    run: Run, make_spec: MakeSpec, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_llama_dir, other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["lantern"])
    tokenizer.save_pretrained(other)
    block = {"student": {"init": "checkpoint"}, "objective": {"teacher_signal": "logits"}}
    with pytest.raises(TokenizerMismatch, match="uld"):
        run(make_spec(block, spec={"start_dir": other}))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_result_puts_the_three_models_side_by_side(
    tmp_path: Path, make_spec: MakeSpec, request: pytest.FixtureRequest, family: str
) -> None:
    folder = request.getfixturevalue(f"tiny_{family}_dir")
    spec = make_spec(
        {"evaluation": {"num_samples": 2}, "data": {"max_new_tokens": 8}},
        spec={"teacher_dir": folder, "start_dir": folder},
        n_epochs=5,
    )
    outcome = distil(spec, tmp_path / "out", MemorySink(), EngineSampler, lambda: False)
    result = json.loads(json.dumps(outcome.result))
    teacher, untrained, student = result["teacher"], result["untrained"], result["student"]
    assert (teacher["agreement"], teacher["rouge_l"]) == (1.0, 1.0)
    assert teacher["kl"] < 1e-5
    assert student["kl"] < 0.7 * untrained["kl"]
    assert student["agreement"] > untrained["agreement"]
    assert (teacher["num_layers"], untrained["num_layers"], student["num_layers"]) == (4, 2, 2)
    for entry in (teacher, untrained, student):
        assert entry["tokens_per_second"] > 0
        assert entry["perplexity"] >= 1
    compression = result["compression"]
    assert compression["layers"] == 2.0
    assert compression["parameters"] == round(
        teacher["num_parameters"] / student["num_parameters"], 3
    )
    assert [set(sample) for sample in result["samples"]] == [
        {"prompt", "reference", "teacher", "untrained", "student"}
    ] * 2
    assert result["samples"][0]["prompt"].startswith("Who keeps house")
    assert result["num_train_rows"] + result["num_validation_rows"] == 40
    assert outcome.trained_tokens > 0
    assert load_model(tmp_path / "out" / outcome.folder).config.num_hidden_layers == 2
