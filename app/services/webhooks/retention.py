"""Retention of webhook events: deletes old ones with their deliveries, in small steps."""

from typing import Final

from app.db.session import transaction
from app.db.webhooks import deliveries

MAX_AGE_SECONDS: Final = 30 * 86_400.0
STEP_ROWS: Final = 500  # rows per transaction
MAX_STEPS: Final = 20  # per round; the next round continues


def delete_old_events() -> int:
    """Deletes events that are older than 30 days, and returns how many it has deleted."""
    num_deleted = 0
    for _ in range(MAX_STEPS):
        with transaction() as session:
            num_rows = deliveries.forget_old_events(session, MAX_AGE_SECONDS, STEP_ROWS)
        num_deleted += num_rows
        if num_rows < STEP_ROWS:
            break
    return num_deleted
