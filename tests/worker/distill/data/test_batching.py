import torch

from worker.distill.data.batching import Selection, collate
from worker.distill.data.rows import Example


def test_what_is_kept_stands_one_before_its_target() -> None:
    rows = [Example((10, 11, 12, 13, 14), ((2, 3), (4, 5))), Example((20, 21, 22), ((1, 3),))]
    batch = collate(rows, [0, 1])
    assert batch.input_ids_BT.tolist() == [[10, 11, 12, 13], [20, 21, 21, 21]]
    assert batch.input_ids_BT[batch.keep_BT].tolist() == [11, 13, 20, 21]
    assert batch.targets_N.tolist() == [12, 14, 21, 22]
    assert batch.num_tokens == 6


def test_a_selection_is_that_of_a_mask() -> None:
    positions, num_columns = [[0, 2], [1, 2, 3]], 4
    selected = Selection.of(positions, num_columns, torch.device("cpu"))
    keep_BT = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 1]]).bool()
    assert selected.positions_N.tolist() == keep_BT.flatten().nonzero()[:, 0].tolist()
    assert selected.mask_BP.tolist() == [[True, True, False], [True, True, True]]
    assert selected.places_N.tolist() == selected.mask_BP.flatten().nonzero()[:, 0].tolist()
