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

    A round deletes a limited number of rows. The next round continues.
    """
    settings = get_settings()
    with transaction() as session:
        projects = retention.projects_with_traffic(session)
    num_steps = max(1, MAX_STEPS // (2 * len(projects) or 1))
    num_deleted = 0
    for project_id in projects:
        old = partial(retention.delete_old, project_id=project_id, most=STEP_ROWS)
        excess = partial(retention.delete_excess, project_id=project_id, most=STEP_ROWS)
        steps: tuple[Callable[[Session], int], ...] = (
            partial(old, max_age_seconds=settings.stored_max_age_seconds),
            partial(excess, max_bytes=settings.stored_bytes_per_project),
        )
        num_deleted += sum(_repeat(step, num_steps) for step in steps)
    return num_deleted


def _repeat(step: Callable[[Session], int], most: int) -> int:
    """Runs up to `most` steps, each in a transaction of its own, until one deletes less than it may."""
    total = 0
    for _ in range(most):
        with transaction() as session:
            num_deleted = step(session)
        total += num_deleted
        if num_deleted < STEP_ROWS:
            break
    return total
