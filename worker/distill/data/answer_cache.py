"""What models answer to prompts, asked once and kept: a killed run goes on where it was, a second job finds them there.

A file holds the answers of one model, one JSON object a line; a line is found by the hash of prompt and sampling. How
an answer is sampled depends on that hash too, not on its neighbours or its place in the file.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from worker.distill.data.sampler import Generation, Sampler
from worker.errors import TeacherGenerationFailed

OnProgress = Callable[
    [int, int, int], None
]  # answers there, answers wanted, tokens written by this call


@dataclass(frozen=True)
class AnswerSampling:
    """How prompts are to be answered; a prompt and its answer together stay within `max_sequence_tokens`.

    With `is_prompt_apart` (a prompt that an encoder reads) the answer alone does.
    """

    max_new_tokens: int
    max_sequence_tokens: int
    temperature: float
    top_p: float = 1.0
    seed: int = 0
    is_prompt_apart: bool = False

    def room(self, prompt: Sequence[int]) -> int:
        taken = 1 if self.is_prompt_apart else len(prompt)  # a decoder begins with its start token
        return min(self.max_new_tokens, self.max_sequence_tokens - taken)

    def key(self, prompt: Sequence[int]) -> str:
        how = [list(prompt), self.room(prompt), self.temperature, self.top_p, self.seed]
        return hashlib.sha256(json.dumps(how).encode()).hexdigest()


class AnswerFile:
    """Answers of one model on disk, appended to as they come; a line cut short by a crash is ignored.

    Without a path they are only remembered.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._answers: dict[str, Generation] = {}
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                self.merge(path)

    def merge(self, path: Path) -> None:
        """Also knows the answers in another file."""
        for line in path.read_bytes().split(b"\n"):
            try:
                entry = json.loads(line)
                answer = Generation(tokens=tuple(entry["tokens"]), is_finished=entry["is_finished"])
                self._answers.setdefault(entry["key"], answer)
            except (ValueError, KeyError, TypeError):
                continue  # a torn line: its answer is asked for again

    def get(self, key: str) -> Generation | None:
        return self._answers.get(key)

    def put(self, key: str, answer: Generation) -> None:
        self._answers[key] = answer
        if self.path is not None:
            self._append(self.path, key)

    def copy_to(self, path: Path, keys: Sequence[str]) -> None:
        """Writes the answers with these keys to a file of their own."""
        path.write_bytes(b"".join(self._line(key) for key in keys if key in self._answers))

    def _append(self, path: Path, key: str) -> None:
        # one write a line, begun on a fresh one: several processes may append, and the last may have died writing
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, b"\n" + self._line(key))
        finally:
            os.close(handle)

    def _line(self, key: str) -> bytes:
        answer = self._answers[key]
        entry = {"key": key, "tokens": answer.tokens, "is_finished": answer.is_finished}
        return json.dumps(entry, separators=(",", ":")).encode() + b"\n"


def ask(
    prompts: Sequence[Sequence[int]],
    how: AnswerSampling,
    answers: AnswerFile,
    sampler: Callable[[], Sampler],
    on_progress: OnProgress | None = None,
) -> list[Generation]:
    """One answer a prompt, in order; only those not on file are generated (then the sampler is made).

    Raises TeacherGenerationFailed if a prompt leaves no room for an answer.
    """
    wanted: dict[str, Sequence[int]] = {}
    for prompt in prompts:
        if how.room(prompt) < 1:
            raise TeacherGenerationFailed(
                f"a prompt of {len(prompt)} tokens leaves no room for an answer within {how.max_sequence_tokens}; raise "
                "max_sequence_tokens or shorten it"
            )
        wanted.setdefault(how.key(prompt), prompt)
    missing = {key: prompt for key, prompt in wanted.items() if answers.get(key) is None}
    if missing:
        progress = _Progress(len(wanted) - len(missing), len(wanted), on_progress)
        engine = sampler()
        # prompts near the limit have less room than the others: each room is a call of its own
        for room in sorted({how.room(prompt) for prompt in missing.values()}, reverse=True):
            group = {key: prompt for key, prompt in missing.items() if how.room(prompt) == room}
            _generate(group, room, how, answers, engine, progress)
    found = [answers.get(how.key(prompt)) for prompt in prompts]
    if any(answer is None for answer in found):
        raise TeacherGenerationFailed(f"{found.count(None)} prompts were not answered")
    return [answer for answer in found if answer is not None]


class _Progress:
    def __init__(self, num_done: int, num_wanted: int, report: OnProgress | None) -> None:
        self.num_done = num_done
        self.num_wanted = num_wanted
        self.num_tokens = 0
        self.report = report

    def __call__(self, num_done: int, num_tokens: int) -> None:
        if self.report is not None:
            self.report(self.num_done + num_done, self.num_wanted, self.num_tokens + num_tokens)


def _generate(
    group: dict[str, Sequence[int]],
    room: int,
    how: AnswerSampling,
    answers: AnswerFile,
    sampler: Sampler,
    progress: _Progress,
) -> None:
    keys = list(group)
    made = sampler.generate(
        list(group.values()),
        max_new_tokens=room,
        temperature=how.temperature,
        top_p=how.top_p,
        seeds=[int(key[:8], 16) >> 1 for key in keys],  # 31 bits: fits every generator
        on_answer=lambda i, answer: answers.put(keys[i], answer),
        on_progress=progress,
    )
    for key, answer in zip(keys, made, strict=True):
        if answers.get(key) is None:
            answers.put(key, answer)
    progress.num_done += len(keys)
    progress.num_tokens += sum(len(answer.tokens) for answer in made)
