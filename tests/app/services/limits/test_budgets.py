"""Budgets of batches, whose key may be unknown."""

import pytest

from app.db.session import transaction
from app.db.usage.limits import set_project_limits
from app.db.usage.records import Usage, add_batch_answer
from app.errors import QuotaExceeded
from app.services.limits.budgets import demand_batch_budget


@pytest.mark.parametrize("key_id", [None, "unknown"])
def test_a_batch_without_a_key_uses_the_budget_of_its_project(
    database: str, key_id: str | None
) -> None:
    with transaction() as session:
        set_project_limits(session, "p", {"daily_tokens": 15})
    demand_batch_budget("p", key_id)
    with transaction() as session:
        add_batch_answer(session, "p", key_id, Usage("tiny", 10, 0, 5))
    with pytest.raises(QuotaExceeded, match="the project p has used 15 of its budget of 15"):
        demand_batch_budget("p", key_id)
    demand_batch_budget("other", key_id)
