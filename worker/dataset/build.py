"""Builds a data set: reads records, leaves out duplicates, splits, and writes the files."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import orjson

from app.contracts.datasets import SIDES, Side
from worker.dataset import personal_data
from worker.dataset.conversations import Conversation, Unsuitable
from worker.dataset.drafts import Draft, Records, draft_of
from worker.dataset.near_duplicates import SimilarTexts
from worker.dataset.personal_data import Masker
from worker.dataset.sides import Groups, kept_sides, side_of
from worker.errors import EmptyDataset
from worker.protocol.dataset_spec import DatasetSpec
from worker.protocol.run_lines import (
    DatasetFile,
    DatasetLine,
    ProgressLine,
    Sink,
    StageLine,
    Throttle,
)

READ, COMPARED = 20.0, 80.0  # percent of the job after reading and after comparing
Json = dict[str, Any]  # Any: the public report


class DatasetBuild:
    """One run: the spec, its records, and counts for the report.

    `left_out` counts answers by the reason why they are not in the data set.
    """

    def __init__(self, spec: DatasetSpec, records: Records, sink: Sink) -> None:
        self._spec = spec
        self._options = spec.options
        self._records = records
        self._sink = sink
        self._throttle = Throttle()
        self._left_out: Counter[str] = Counter()
        self._num_records = 0

    def run(self, out: Path) -> None:
        """Writes the files and sends their line. Raises EmptyDataset if no training row is left."""
        self._sink(StageLine(name="reading"))
        read = self._read()
        answered = {draft.full for draft in read}
        drafts = self._without_beginnings(read)
        self._sink(StageLine(name="deduplicating"))
        drafts = self._without_duplicates(drafts)
        sides = self._split(drafts)
        self._sink(StageLine(name="writing"))
        self._write(out, drafts, sides, answered)

    def _read(self) -> list[Draft]:
        drafts = []
        for place, record in self._records:
            self._num_records += 1
            for choice in range(len(record["completion"]["choices"])):
                try:
                    drafts.append(draft_of(place, record, choice, self._options))
                except Unsuitable as reason:
                    self._left_out[str(reason)] += 1
            self._report(READ * place / self._records.num_bytes)
        return drafts

    def _without_beginnings(self, drafts: Sequence[Draft]) -> list[Draft]:
        """Leaves out conversations that continue in another one, and exact duplicates."""
        continued = {beginning for draft in drafts for _, beginning in draft.beginnings}
        kept: dict[bytes, Draft] = {}
        for draft in drafts:
            if draft.full in continued:
                self._left_out["continued"] += 1
            elif draft.full in kept:
                self._left_out["exact_duplicate"] += 1
            else:
                kept[draft.full] = draft
        return list(kept.values())

    def _without_duplicates(self, drafts: Sequence[Draft]) -> list[Draft]:
        """Leaves out conversations that are similar to a newer one, after masking."""
        threshold = self._options.near_duplicates
        if threshold is None:
            return list(drafts)
        index = SimilarTexts(threshold, lambda item: self._text(drafts[item]))
        kept = []
        for number, draft in enumerate(drafts):
            if index.add_unless_similar(number, self._text(draft)):
                kept.append(draft)
            else:
                self._left_out["near_duplicate"] += 1
            self._report(READ + (COMPARED - READ) * number / len(drafts))
        return kept

    def _split(self, drafts: Sequence[Draft]) -> list[Side | None]:
        """Returns the side of each draft, or None if similar questions are on another side."""
        questions = list(dict.fromkeys(draft.question for draft in drafts))
        numbers = {question: number for number, question in enumerate(questions)}
        groups = Groups()
        threshold = self._options.near_duplicates
        index = SimilarTexts(threshold or 1.0, questions.__getitem__)
        for question in questions:
            self._report(COMPARED)
            number = groups.add()
            if threshold is None:
                continue
            for other in index.add(number, question):
                groups.join(number, other)
        options = self._options
        sides = kept_sides(
            [groups.group_of(numbers[draft.question]) for draft in drafts],
            [
                side_of(draft.question, options.validation_fraction, options.test_fraction)
                for draft in drafts
            ],
        )
        self._left_out["other_side"] += sides.count(None)
        return sides

    def _write(
        self,
        out: Path,
        drafts: Sequence[Draft],
        sides: Sequence[Side | None],
        answered: set[bytes],
    ) -> None:
        counts = SideCounts()
        masks: Counter[str] = Counter()
        files: dict[Side, IO[bytes]] = {}
        try:
            for number, (draft, side) in enumerate(zip(drafts, sides, strict=True)):
                if side is None:
                    continue
                masker = Masker(self._options.mask)
                line = _row(self._conversation(draft, masker), draft, answered)
                if len(line) > self._spec.max_row_bytes:
                    self._left_out["too_long"] += 1
                    continue
                if side not in files:
                    files[side] = (out / f"{side}.jsonl").open("wb")
                files[side].write(line + b"\n")
                counts.add(side, draft, len(line))
                masks.update(masker.counts)
                self._report(COMPARED + (100 - COMPARED) * number / len(drafts))
        finally:
            for file in files.values():
                file.close()
        if not counts.rows["training"]:
            raise EmptyDataset(self._explain(counts))
        report = {
            "num_completions": self._num_records,
            "left_out": {reason: count for reason, count in self._left_out.items() if count},
            **counts.report(),
            "masked": {kind: masks[kind] for kind in self._options.mask},
            "mask_version": personal_data.VERSION if self._options.mask else None,
        }
        self._sink(DatasetLine(files=counts.files(), report=report))

    def _conversation(self, draft: Draft, masker: Masker) -> Conversation:
        return Conversation.of(self._records.at(draft.place), draft.choice).masked(masker)

    def _text(self, draft: Draft) -> str:
        return self._conversation(draft, Masker(self._options.mask)).comparable_text()

    def _report(self, percent: float) -> None:
        if self._throttle.is_due():
            self._sink(ProgressLine(percent=round(percent, 1)))

    def _explain(self, counts: "SideCounts") -> str:
        left_out = ", ".join(
            f"{count} {reason}" for reason, count in self._left_out.most_common() if count
        )
        others = sum(counts.rows.values())
        return (
            f"of {self._num_records} completions no training row is left (left out: {left_out or 'none'}; "
            f"validation and test: {others}); select more completions, or set validation_fraction and "
            "test_fraction to 0"
        )


class SideCounts:
    """Counts of the rows that were written, by side and by model."""

    def __init__(self) -> None:
        self.rows: Counter[Side] = Counter()
        self._bytes: Counter[Side] = Counter()
        self._longest: Counter[Side] = Counter()
        self._tokens: Counter[Side] = Counter()
        self._models: Counter[str] = Counter()
        self._times: list[float] = []

    def add(self, side: Side, draft: Draft, num_bytes: int) -> None:
        """Counts a row of this length, without its line end."""
        self.rows[side] += 1
        self._bytes[side] += num_bytes + 1
        self._longest[side] = max(self._longest[side], num_bytes)
        self._tokens[side] += draft.prompt_tokens + draft.completion_tokens
        self._models[draft.model] += 1
        self._times = [
            min([*self._times, draft.created_at]),
            max([*self._times, draft.created_at]),
        ]

    def files(self) -> tuple[DatasetFile, ...]:
        """Returns the files of the sides that have rows."""
        return tuple(
            DatasetFile(
                side=side,
                name=f"{side}.jsonl",
                num_rows=self.rows[side],
                max_row_bytes=self._longest[side],
            )
            for side in SIDES
            if self.rows[side]
        )

    def report(self) -> Json:
        """Returns the counts as part of the report. Tokens are those of the original answers."""
        return {
            "num_rows": self.rows.total(),
            "sides": {
                side: {
                    "num_rows": self.rows[side],
                    "bytes": self._bytes[side],
                    "tokens": self._tokens[side],
                }
                for side in SIDES
            },
            "models": dict(self._models),
            "first_created_at": int(self._times[0]) if self._times else None,
            "last_created_at": int(self._times[-1]) if self._times else None,
        }


def _row(conversation: Conversation, draft: Draft, answered: set[bytes]) -> bytes:
    """Returns the row as JSON. Earlier answers that no stored completion has get the weight 0."""
    for index, beginning in draft.beginnings:
        if beginning not in answered:
            conversation.messages[index]["weight"] = 0
    return orjson.dumps(conversation.row())
