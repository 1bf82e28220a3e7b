"""Retention of stored completions: deletes those that are too old or too many, in small steps."""

from collections.abc import Callable
from functools import partial
from typing import Final

from app.db.session import Session, transaction
from app.db.traffic import retention
from app.settings import get_settings

STEP_ROWS: Final = 500  # rows per transaction
MAX_STEPS: Final = 100  # per round, so that a round of the garbage collector has an end


def delete_unretained() -> int:
    """Runs one round over all projects and returns how many stored completions it deleted.

    A round deletes a limited number of rows, which all projects share. The next round continues.
    """
    settings = get_settings()
    with transaction() as session:
        projects = retention.projects_with_traffic(session)
    steps: list[Callable[[Session], int]] = []
    for project_id in projects:
        old = partial(retention.delete_old, project_id=project_id, most=STEP_ROWS)
        excess = partial(retention.delete_excess, project_id=project_id, most=STEP_ROWS)
        steps.append(partial(old, max_age_seconds=settings.stored_max_age_seconds))
        steps.append(partial(excess, max_bytes=settings.stored_bytes_per_project))
    num_deleted, num_steps = 0, 0
    while steps and num_steps < MAX_STEPS:
        unfinished = []
        for step in steps:
            with transaction() as session:
                num_rows = step(session)
            num_deleted += num_rows
            if num_rows:
                num_steps += 1
            if num_rows == STEP_ROWS:
                unfinished.append(step)
        steps = unfinished
    return num_deleted
