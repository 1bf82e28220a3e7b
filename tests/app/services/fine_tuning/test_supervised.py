import pytest

from app.services.fine_tuning.supervised import automatic_epochs, normalised_suffix


@pytest.mark.parametrize(
    ("num_rows", "num_epochs"),
    [(1, 25), (4, 25), (10, 10), (33, 3), (34, 3), (8333, 3), (8334, 2), (30_000, 1)],
)
def test_epochs_are_chosen_by_the_number_of_rows(num_rows: int, num_epochs: int) -> None:
    assert automatic_epochs(num_rows) == num_epochs


@pytest.mark.parametrize(
    ("suffix", "name"),
    [(None, ""), ("support", "support"), ("Crème Brûlée", "creme-brulee"), ("--a__b--", "a-b")],
)
def test_a_suffix_becomes_a_part_of_a_name(suffix: str | None, name: str) -> None:
    assert normalised_suffix(suffix) == name
