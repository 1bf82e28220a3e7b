import shutil
from pathlib import Path

import pytest

from app.contracts.messages import ADAPTER_BASE, AdapterBase, ArtifactRef
from app.services.estimates.model_files import stored_sizes
from app.storage import store
from tests.job_rows import FACTS


@pytest.mark.usefixtures("settings_env")
def test_a_checkpoint_with_adapters_has_the_sizes_of_its_start_model(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    start = store().put_folder(tiny_llama_dir, "models/start")
    model = tmp_path / "step" / "model"
    model.mkdir(parents=True)
    shutil.copyfile(tiny_llama_dir / "config.json", model / "config.json")
    (model / ADAPTER_BASE).write_text(AdapterBase(start=start, dtype="float32").model_dump_json())
    stored = store().put_folder(tmp_path / "step", "checkpoints/a/1/step-5")
    checkpoint = ArtifactRef(key=f"{stored.key}/model", bytes=stored.bytes)
    assert stored_sizes(checkpoint, FACTS) == stored_sizes(start, FACTS)
    assert not stored_sizes(start, FACTS).guess_reason
