"""Counts of an estimate are those of a run with the same files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from app.contracts.batch_plan import BatchPlan
from app.contracts.distillation import Hyperparameters
from app.contracts.planned_jobs import RowCounts
from app.services.estimates import row_counts
from app.services.estimates.row_counts import CountedFile, CountRequest, count
from app.services.row_lengths import Reader
from app.settings import Settings
from app.storage import store
from worker.distill.data.answer_cache import AnswerFile
from worker.distill.data.dataset import Preparation, Rows
from worker.distill.data.dataset import Reader as RunReader
from worker.distill.run_costs import count_rows
from worker.models.architectures import read_config
from worker.models.model_facts import chat_cost
from worker.protocol.run_spec import RunSpec

Json = dict[str, Any]  # Any: open-ended JSON
H = {"n_epochs": 2, "batch_tokens": 128}


def completion(i: int) -> Json:
    answer = f"The student keeps the house {i}{' and a lantern' * (i % 7)}."
    return {"prompt": f"Who keeps number {i}{' and the jar' * (i % 4)}?", "completion": answer}


def chat(i: int) -> Json:
    asked, answer = completion(i).values()
    return {
        "messages": [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": asked},
            {"role": "assistant", "content": answer},
        ]
    }


def text(i: int) -> Json:
    return {"text": " ".join(completion(i).values())}


FORMATS: dict[str, Callable[[int], Json]] = {"completion": completion, "chat": chat, "text": text}


@pytest.fixture
def put_rows(settings_env: Callable[..., Settings], tmp_path: Path) -> Callable[..., CountedFile]:
    """A function that stores rows, and writes them to a file for a run."""

    def put(rows: list[Json], name: str = "rows", *, is_answered: bool = True) -> CountedFile:
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        with store().writer(f"files/{name}") as file:
            file.write(content)
        (tmp_path / name).write_bytes(content)
        return CountedFile(
            store_key=f"files/{name}", num_bytes=len(content), is_answered=is_answered
        )

    return put


@pytest.fixture
def reader_of(settings_env: Callable[..., Settings]) -> Callable[..., Reader]:
    """A function that stores a model and returns how it reads rows."""

    def read(folder: Path, family: Any = "causal") -> Reader:
        store().put_folder(folder, f"models/{folder.name}")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if tokenizer.chat_template is None:
            return Reader(f"models/{folder.name}", family)
        cost = chat_cost(tokenizer)
        assert cost is not None
        return Reader(f"models/{folder.name}", family, cost)

    return read


def rows_of_run(spec: RunSpec) -> Rows:
    reader = RunReader(read_config(spec.start_dir), AutoTokenizer.from_pretrained(spec.start_dir))
    return Preparation(
        spec=spec,
        teacher=reader,
        student=reader,
        has_one_tokenizer=True,
        answers=AnswerFile(None),
        sampler=lambda: pytest.fail("the rows have answers"),
        sink=lambda line: None,
        check_stop=lambda: None,
    ).rows()


def counts_of_run(spec: RunSpec, num_steps: int) -> RowCounts:
    return count_rows(spec, rows_of_run(spec), num_steps=num_steps, num_planned_steps=num_steps)


def spec_of(tmp_path: Path, model: Path, **options: Any) -> RunSpec:
    return RunSpec.model_validate(
        {
            "distillation": {"teacher": "tiny", "hyperparameters": H},
            "teacher_dir": model,
            "start_dir": model,
            "training_path": tmp_path / "rows",
            "cache_dir": tmp_path / "cache",
            "seed": 3,
            **options,
        }
    )


@pytest.mark.parametrize("format_name", FORMATS)
def test_rows_are_counted_as_a_run_counts_them(
    put_rows: Callable[..., CountedFile],
    reader_of: Callable[..., Reader],
    tiny_llama_dir: Path,
    tmp_path: Path,
    format_name: str,
) -> None:
    rows = [FORMATS[format_name](i) for i in range(60)]
    request = CountRequest(
        training=put_rows(rows),
        readers=(reader_of(tiny_llama_dir),),
        answer_tokens=0,
        hyperparameters=Hyperparameters.model_validate(H),
        seed=3,
    )
    counted = count(request).counts
    assert counted is not None
    spec = spec_of(tmp_path, tiny_llama_dir)
    expected = counts_of_run(spec, counted.num_steps)
    assert counted.num_train == expected.num_train == 54
    assert counted.train_tokens == expected.train_tokens
    assert counted.valid_tokens == expected.valid_tokens
    assert counted.longest_tokens == expected.longest_tokens
    assert counted.num_epochs == expected.num_epochs == 2
    lengths = [example.num_tokens for example in rows_of_run(spec).train]
    assert counted.num_steps == BatchPlan(lengths, batch_tokens=128, seed=3).num_steps(2)
    assert counted.train_targets == pytest.approx(expected.train_targets, rel=0.1)
    assert counted.num_evals == expected.num_evals


def test_an_encoder_decoder_reads_two_sequences(
    put_rows: Callable[..., CountedFile],
    reader_of: Callable[..., Reader],
    tiny_t5_dir: Path,
    tmp_path: Path,
) -> None:
    request = CountRequest(
        training=put_rows([completion(i) for i in range(30)]),
        validation=put_rows([completion(i + 100) for i in range(5)], "valid"),
        readers=(reader_of(tiny_t5_dir, "seq2seq"),),
        answer_tokens=0,
        hyperparameters=Hyperparameters.model_validate(H),
        seed=3,
    )
    counted = count(request).counts
    assert counted is not None
    spec = spec_of(tmp_path, tiny_t5_dir, validation_path=tmp_path / "valid")
    expected = counts_of_run(spec, counted.num_steps)
    assert (counted.num_train, counted.num_valid) == (30, 5)
    assert counted.train_tokens == pytest.approx(expected.train_tokens, rel=0.02)
    assert counted.valid_tokens == pytest.approx(expected.valid_tokens, rel=0.05)
    assert counted.num_epochs == pytest.approx(expected.num_epochs, rel=0.1)


def test_answers_of_the_teacher_are_assumed(
    put_rows: Callable[..., CountedFile], reader_of: Callable[..., Reader], tiny_llama_dir: Path
) -> None:
    prompts = [{"prompt": completion(i)["prompt"]} for i in range(20)]
    reader = reader_of(tiny_llama_dir)
    found = [
        count(
            CountRequest(
                training=put_rows(prompts, is_answered=False),
                readers=(reader,),
                answer_tokens=length,
                hyperparameters=Hyperparameters.model_validate(H),
                seed=0,
            )
        ).counts
        for length in (10.0, 30.0)
    ]
    assert found[0] is not None
    assert found[1] is not None
    assert found[0].num_unanswered == 20
    assert found[1].train_tokens - found[0].train_tokens == 18 * 20
    assert found[0].label_tokens is None


def test_only_rows_without_answers_are_answered_by_the_teacher(
    put_rows: Callable[..., CountedFile], reader_of: Callable[..., Reader], tiny_llama_dir: Path
) -> None:
    prompts = [{"prompt": completion(i)["prompt"]} for i in range(20)]
    held_out = [{"prompt": f"Is it {i}?", "completion": ("yes", "no")[i % 2]} for i in range(40)]
    counted = count(
        CountRequest(
            training=put_rows(prompts, is_answered=False),
            validation=put_rows(held_out, "valid"),
            readers=(reader_of(tiny_llama_dir),),
            answer_tokens=10.0,
            hyperparameters=Hyperparameters.model_validate(H),
            seed=0,
        )
    ).counts
    assert counted is not None
    assert (counted.num_unanswered, counted.num_valid) == (20, 40)
    assert counted.label_tokens is not None


def test_labels_are_found(
    put_rows: Callable[..., CountedFile], reader_of: Callable[..., Reader], tiny_llama_dir: Path
) -> None:
    rows = [{"prompt": f"Is it {i}?", "completion": ("yes", "no")[i % 2]} for i in range(100)]
    request = CountRequest(
        training=put_rows(rows),
        readers=(reader_of(tiny_llama_dir),),
        answer_tokens=0,
        hyperparameters=Hyperparameters(),
        seed=0,
    )
    counted = count(request).counts
    assert counted is not None
    assert counted.label_tokens is not None


def test_a_large_file_is_sampled(
    put_rows: Callable[..., CountedFile],
    reader_of: Callable[..., Reader],
    tiny_llama_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    request = CountRequest(
        training=put_rows([completion(i) for i in range(400)]),
        readers=(reader_of(tiny_llama_dir),),
        answer_tokens=0,
        hyperparameters=Hyperparameters.model_validate(H),
        seed=0,
    )
    whole = count(request)
    monkeypatch.setattr(row_counts, "MAX_SAMPLED_BYTES", request.training.num_bytes // 5)
    sampled = count(request)
    assert whole.counts is not None
    assert sampled.counts is not None
    assert whole.sampled_share == 1.0
    assert sampled.sampled_share == pytest.approx(1 / 5, rel=0.2)
    assert sampled.counts.train_tokens == pytest.approx(whole.counts.train_tokens, rel=0.15)
    assert sampled.counts.num_steps == pytest.approx(whole.counts.num_steps, rel=0.15)


@pytest.mark.parametrize(("num_rows", "expected"), [(1, (1, 1)), (3, (3, 3)), (2, (1, 1))])
def test_few_rows_are_split_as_in_a_run(
    put_rows: Callable[..., CountedFile],
    reader_of: Callable[..., Reader],
    tiny_llama_dir: Path,
    num_rows: int,
    expected: tuple[int, int],
) -> None:
    """Three rows with one question are on both sides, and one of two questions is held out."""
    rows = [completion(i if num_rows == 2 else 0) for i in range(num_rows)]
    request = CountRequest(
        training=put_rows(rows),
        readers=(reader_of(tiny_llama_dir),),
        answer_tokens=0,
        hyperparameters=Hyperparameters(),
        seed=0,
    )
    counted = count(request).counts
    assert counted is not None
    assert (counted.num_train, counted.num_valid) == expected


def test_a_lost_file_has_no_counts(
    put_rows: Callable[..., CountedFile], reader_of: Callable[..., Reader], tiny_llama_dir: Path
) -> None:
    request = CountRequest(
        training=CountedFile(store_key="files/gone", num_bytes=10, is_answered=True),
        readers=(reader_of(tiny_llama_dir),),
        answer_tokens=0,
        hyperparameters=Hyperparameters(),
        seed=0,
    )
    reply = count(request)
    assert reply.counts is None
    assert "upload it again" in reply.fault


@pytest.mark.parametrize(
    ("options", "share"),
    [({"n_epochs": 40}, 1.0), ({"n_epochs": 40}, 0.5), ({"n_epochs": 1000, "max_steps": 60}, 1.0)],
    ids=["all epochs", "stopped early", "steps are limited"],
)
def test_a_run_of_many_epochs_counts_them_from_its_steps(
    put_rows: Callable[..., CountedFile],
    tiny_llama_dir: Path,
    tmp_path: Path,
    options: Json,
    share: float,
) -> None:
    put_rows([completion(i) for i in range(60)])
    block = {"teacher": "tiny", "hyperparameters": {"batch_tokens": 128, **options}}
    spec = spec_of(tmp_path, tiny_llama_dir, distillation=block)
    rows = rows_of_run(spec)
    plan = BatchPlan([row.num_tokens for row in rows.train], batch_tokens=128, seed=3)
    full_steps = plan.num_steps(40)
    planned = options.get("max_steps", full_steps)
    num_steps = round(share * planned)
    counts = count_rows(spec, rows, num_steps=num_steps, num_planned_steps=planned)
    assert counts.num_epochs == pytest.approx(40 * num_steps / full_steps, rel=0.05)
