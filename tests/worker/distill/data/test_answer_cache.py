from pathlib import Path

import pytest
from transformers import PreTrainedModel

from worker.distill.data.answer_cache import AnswerFile, AnswerSampling, ask
from worker.distill.data.sampler import Generation, Sampler
from worker.distill.students.recipe import load_model
from worker.errors import TeacherGenerationFailed
from worker.train import EngineSampler

HOW = AnswerSampling(max_new_tokens=6, max_sequence_tokens=64, temperature=0.9, seed=1)
PROMPTS = [[40 + i, 50 + i, 60 + i] for i in range(100)]  # more than are decoded together


@pytest.fixture
def model(tiny_llama_dir: Path) -> PreTrainedModel:
    return load_model(tiny_llama_dir).requires_grad_(False)


def never() -> Sampler:
    raise AssertionError("everything is on file")


def test_answers_on_file_are_not_asked_for_again(model: PreTrainedModel, tmp_path: Path) -> None:
    made = ask(PROMPTS, HOW, AnswerFile(tmp_path / "a.jsonl"), lambda: EngineSampler(model))
    assert ask(PROMPTS, HOW, AnswerFile(tmp_path / "a.jsonl"), never) == made
    assert all(1 <= len(answer.tokens) <= 6 for answer in made)


def test_a_killed_run_goes_on_where_it_was_and_ends_with_the_same_answers(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    whole = ask(PROMPTS, HOW, AnswerFile(tmp_path / "whole.jsonl"), lambda: EngineSampler(model))

    def kill(num_done: int, num_wanted: int, num_tokens: int) -> None:
        if num_done >= 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(PROMPTS, HOW, AnswerFile(tmp_path / "part.jsonl"), lambda: EngineSampler(model), kill)
    assert 3 <= len((tmp_path / "part.jsonl").read_text().split()) < len(PROMPTS)
    told: list[int] = []
    again = ask(
        PROMPTS,
        HOW,
        AnswerFile(tmp_path / "part.jsonl"),
        lambda: EngineSampler(model),
        lambda num_done, *_: told.append(num_done),
    )
    assert again == whole
    assert told[0] >= 3


def test_an_answer_depends_neither_on_its_neighbours_nor_on_its_place(
    model: PreTrainedModel,
) -> None:
    whole = ask(PROMPTS, HOW, AnswerFile(None), lambda: EngineSampler(model))
    alone = ask([PROMPTS[7]], HOW, AnswerFile(None), lambda: EngineSampler(model))
    turned = ask(PROMPTS[::-1], HOW, AnswerFile(None), lambda: EngineSampler(model))
    assert alone == [whole[7]]
    assert turned == whole[::-1]


def test_the_same_prompt_has_one_answer_and_another_sampling_another(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    file = AnswerFile(tmp_path / "a.jsonl")
    one, two = ask([PROMPTS[0], PROMPTS[0]], HOW, file, lambda: EngineSampler(model))
    assert one == two
    ask([PROMPTS[0]], AnswerSampling(6, 64, temperature=0.0), file, lambda: EngineSampler(model))
    assert len((tmp_path / "a.jsonl").read_text().split()) == 2


def test_a_torn_last_line_is_ignored_and_the_next_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    answer = Generation(tokens=(1, 2), is_finished=True)
    AnswerFile(path).put("first", answer)
    with path.open("a") as file:
        file.write('\n{"key":"torn","tok')
    AnswerFile(path).put("second", answer)
    read = AnswerFile(path)
    assert (read.get("first"), read.get("torn"), read.get("second")) == (answer, None, answer)


def test_a_prompt_near_the_limit_gets_the_room_that_is_left(model: PreTrainedModel) -> None:
    how = AnswerSampling(max_new_tokens=6, max_sequence_tokens=10, temperature=0.0)
    long, short = ask([[50] * 8, [50, 51]], how, AnswerFile(None), lambda: EngineSampler(model))
    assert len(long.tokens) <= 2
    assert len(short.tokens) <= 6
    with pytest.raises(TeacherGenerationFailed, match="no room"):
        ask([[50] * 10], how, AnswerFile(None), never)


def test_a_copy_holds_the_answers_that_were_picked(model: PreTrainedModel, tmp_path: Path) -> None:
    file = AnswerFile(tmp_path / "a.jsonl")
    ask(PROMPTS[:2], HOW, file, lambda: EngineSampler(model))
    file.copy_to(tmp_path / "copy.jsonl", [HOW.key(PROMPTS[0])])
    copied = AnswerFile(tmp_path / "copy.jsonl")
    assert copied.get(HOW.key(PROMPTS[0])) == file.get(HOW.key(PROMPTS[0]))
    assert copied.get(HOW.key(PROMPTS[1])) is None
