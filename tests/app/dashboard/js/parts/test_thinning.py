"""The thinning of long series, which node runs."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from app.dashboard.assets import FOLDER

NODE = shutil.which("node")
# Thins a long series, as a whole and in a range.
THIN = """
const { thinned } = await import(process.argv[1]);
const points = Array.from({ length: 6000 }, (_, step) => ({ step, value: Math.sin(step * step) * (step % 977) }));
const range = [1000, 5000];
const inside = points.filter(({ step }) => step >= range[0] && step <= range[1]);
console.log(JSON.stringify({ all: thinned(points, 100), zoomed: thinned(points, 100, range), inside, points }));
"""


@pytest.mark.skipif(NODE is None, reason="node is not installed")
def test_a_thinned_series_keeps_the_extremes_of_each_bucket(tmp_path: Path) -> None:
    module = tmp_path / "thinning.mjs"
    module.write_text((FOLDER / "js" / "parts" / "thinning.js").read_text())
    command = [NODE or "", "--input-type=module", "-e", THIN, str(module)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    series = json.loads(done.stdout)
    for kept, points in ((series["all"], series["points"]), (series["zoomed"], series["inside"])):
        assert len(kept) <= 2 * 100 + 4
        steps = [point["step"] for point in kept]
        assert steps == sorted(set(steps))
        values = {point["step"]: point["value"] for point in kept}
        first, last = points[0]["step"], points[-1]["step"]
        width = (last - first) / 100
        for bucket in range(99):
            inside = [
                point["value"]
                for point in points
                if first + width * bucket <= point["step"] < first + width * (bucket + 1)
            ]
            ours = [
                value
                for step, value in values.items()
                if first + width * bucket <= step < first + width * (bucket + 1)
            ]
            assert max(ours) == max(inside)
            assert min(ours) == min(inside)
