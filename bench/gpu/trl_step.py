"""The step of TRL's GKDTrainer on the same models, where TRL is installed."""

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from random import Random
from statistics import median
from unittest.mock import patch

from bench.children import ROOT, ask_child
from bench.gpu.models import Json
from bench.gpu.sizes import Sizes

PEER = "trl"


def measure_trl(work: Path, folders: tuple[Path, Path], sizes: Sizes, device: str) -> Json:
    """Returns the tokens per second of TRL with a live teacher, at the smallest batch.

    TRL keeps all logits in memory. If it is not installed, the result has only `not_compared`.
    Raises ChildFailed.
    """
    if find_spec(PEER) is None:
        return {"not_compared": ["TRL is not installed"]}
    batch_tokens, num_steps = sizes.batch_tokens[0], sizes.num_warm + sizes.num_timed
    num_rows = batch_tokens // sizes.row_tokens
    work.mkdir(parents=True, exist_ok=True)
    rows_path = work / "rows.json"
    rows_path.write_text(json.dumps({"rows": rows_of(sizes, num_rows * num_steps)}))
    task = {
        "do": "time_steps",
        "work": str(work),
        "num_threads": 1,
        "rows_path": str(rows_path),
        "batches": [
            list(range(first, first + num_rows))
            for first in range(0, num_rows * num_steps, num_rows)
        ],
        "batch_rows": num_rows,
        "teacher_dir": str(folders[0]),
        "student_dir": str(folders[1]),
        "contender": {"trains_head": True, "divergence": "jsd"},
        "learning_rate": 1e-5,
        "seed": 0,
        "bf16": True,
        "device": device,
        "teacher_dtype": "bfloat16",
    }
    # with several visible GPUs its trainer would use them all
    with patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": "0"}):
        answer = ask_child([sys.executable, "-P", str(ROOT / "bench" / "trl_child.py")], task)
    seconds = median(answer["seconds"][sizes.num_warm :])
    return {
        "batch_tokens": batch_tokens,
        "tokens_per_second": round(batch_tokens / seconds),
        "ms_per_step": round(1000 * seconds, 2),
        "peak_bytes": answer["peak_bytes"],
        "versions": answer["versions"],
    }


def rows_of(sizes: Sizes, num_rows: int) -> list[Json]:
    """Returns rows of random tokens. One half of a row is completion."""
    random = Random(0)
    length = sizes.row_tokens
    return [
        {
            "token_ids": [random.randrange(sizes.vocab_size) for _ in range(length)],
            "spans": [[length // 2, length]],
        }
        for _ in range(num_rows)
    ]
