"""Compares the events of a job, of every type, with its rows: none twice, none missing.

Knows nothing of the service's own code. Rows are those of the tables, as dictionaries.
"""

import itertools
from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

Row = dict[str, Any]  # Any: a row of the database
FOLLOWING: Final = {
    "queued": {"queued", "running", "paused", "cancelled", "failed"},
    "running": {"queued", "paused", "succeeded", "failed", "cancelled"},
    "paused": {"queued", "cancelled"},
    "failed": {"queued"},
    "succeeded": set(),
    "cancelled": set(),
}


@dataclass
class History:
    """What is in the database of one job. `events` are in the order of `seq`."""

    job: Row
    attempts: list[Row]
    events: list[Row]
    metrics: list[Row]
    checkpoints: list[Row]
    lost: list[str] = field(default_factory=list)
    duplicated: list[str] = field(default_factory=list)

    def judge(self) -> None:
        """Fills `lost` and `duplicated`."""
        self._judge_states()
        self._judge_stages()
        self._judge_metrics()
        self._judge_checkpoints()
        self._judge_messages()

    def _of_type(self, name: str) -> list[Row]:
        return [event for event in self.events if event["type"] == name]

    def _by_attempt(self) -> list[list[Row]]:
        """The events before the first attempt, then those of each attempt and what followed it."""
        groups: list[list[Row]] = [[]]
        for event in self.events:
            if event["type"] == "state" and event["data"]["status"] == "running":
                groups.append([])
            groups[-1].append(event)
        return groups

    def _lose(self, wrong: str) -> None:
        self.lost.append(f"{self.job['id']}: {wrong}")

    def _demand_unique(self, what: str, keys: Iterable[Hashable]) -> None:
        self.duplicated += [
            f"{self.job['id']}: {count} times the {what} event {key}"
            for key, count in Counter(keys).items()
            if count > 1
        ]

    def _judge_states(self) -> None:
        states = [event["data"]["status"] for event in self._of_type("state")]
        illegal: list[tuple[str, ...]] = [
            pair for pair in itertools.pairwise(states) if pair[1] not in FOLLOWING[pair[0]]
        ]
        # twice `queued` is a lost worker and the end of the wait after it; once more is a duplicate
        illegal += [
            run
            for run in zip(states, states[1:], states[2:], strict=False)
            if set(run) == {"queued"}
        ]
        self.duplicated += [
            f"{self.job['id']}: states follow as {states}: {pair}" for pair in illegal
        ]
        current = "queued" if self.job["status"] == "retry_wait" else self.job["status"]
        if states[:1] != ["queued"] or states[-1:] != [current]:
            self._lose(f"is {current}, and its state events are {states}")
        num_missing = len(self.attempts) - states.count("running")
        if num_missing:
            wrongs = self.lost if num_missing > 0 else self.duplicated
            wrongs.append(
                f"{self.job['id']}: {len(self.attempts)} attempts, and its states are {states}"
            )

    def _judge_stages(self) -> None:
        told = [event["data"]["stage"] for event in self._of_type("stage")]
        kept = [stage["name"] for stage in self.job["stages"]]
        if told[len(told) - len(kept) :] != kept:
            wrongs = self.lost if len(told) < len(kept) else self.duplicated
            wrongs.append(f"{self.job['id']}: its stages are {kept}, and its stage events {told}")
        for events in self._by_attempt():
            self._demand_unique(
                "stage", (e["data"]["stage"] for e in events if e["type"] == "stage")
            )

    def _judge_metrics(self) -> None:
        for events in self._by_attempt():
            told = [event["data"] for event in events if event["type"] == "metrics"]
            self._demand_unique("metrics", ((data["step"], *sorted(data)) for data in told))
        newest = {
            (name[:64], event["data"]["step"]): value
            for event in self._of_type("metrics")
            for name, value in event["data"].items()
            if name not in ("step", "total_steps") and value is not None
        }
        kept = {(row["name"], row["step"]): row["value"] for row in self.metrics}
        if newest != kept:
            differing = sorted(
                key for key in newest.keys() | kept.keys() if newest.get(key) != kept.get(key)
            )
            self._lose(f"metrics and their events differ: {differing[:5]}")
        if self.job["status"] == "succeeded":
            steps = sorted(step for name, step in kept if name == "train_loss")
            if steps and steps != list(range(steps[0], steps[-1] + 1, steps[0])):
                self._lose(f"train_loss has gaps: {steps[:50]}")

    def _judge_checkpoints(self) -> None:
        told = [event["data"]["checkpoint_id"] for event in self._of_type("checkpoint")]
        self._demand_unique("checkpoint", told)
        for events in self._by_attempt():
            self._demand_unique(
                "checkpoint",
                (event["data"]["step"] for event in events if event["type"] == "checkpoint"),
            )
        untold = {row["id"] for row in self.checkpoints} - set(told)
        if untold:
            self._lose(f"checkpoints without an event: {sorted(untold)}")

    def _judge_messages(self) -> None:
        groups = self._by_attempt()
        created = [e for e in self._of_type("message") if "model created:" in e["message"]]
        if self.job["status"] == "succeeded" and len(created) != 1:
            self._lose(f"has succeeded, and the messages about its model are {created}")
        for events in groups:
            told = [event for event in events if event["type"] == "message"]
            self._demand_unique(
                "message", ((e["message"], repr(sorted(e["data"].items()))) for e in told)
            )
        for attempt, events in zip(self.attempts, groups[1:], strict=False):
            step = attempt["resumed_from"]
            resumed = [
                e for e in events if e["type"] == "message" and "run resumes from" in e["message"]
            ]
            if attempt["outcome"] == "succeeded" and [e["data"]["step"] for e in resumed] != [
                step
            ] * (step is not None):
                self._lose(
                    f"attempt {attempt['attempt']} began at {step}, and its messages are {resumed}"
                )
