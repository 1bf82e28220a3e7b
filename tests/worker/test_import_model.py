"""A foreign model becomes a plain checkpoint that gives the same logits, or a reason is given."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import save_tiny
from tests.worker.memory_sink import MemorySink
from worker.errors import BrokenFile, UnsafeFile, UnsupportedModel, WorkerError
from worker.import_model import SENTENCE, import_model
from worker.models.architectures import SUPPORTED, kind_of, model_class, read_config
from worker.models.model_facts import model_facts
from worker.models.vocabulary import num_token_ids
from worker.protocol.import_spec import ImportSpec
from worker.protocol.run_lines import ErrorLine, ResultLine, RunLine, run_line


@pytest.fixture
def folder(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def run_import(folder: Path, out: Path) -> list[RunLine]:
    sink = MemorySink()
    import_model(ImportSpec(format="folder", source_path=folder), out, sink)
    return sink.lines


def logits(folder: Path) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = read_config(folder)
    model = model_class(config).from_pretrained(folder, dtype=torch.float32).eval()
    inputs = {"input_ids": tokenizer(SENTENCE, return_tensors="pt")["input_ids"]}
    if kind_of(config) == "seq2seq":
        inputs["decoder_input_ids"] = inputs["input_ids"][:, 3:]
    with torch.inference_mode():
        result: torch.Tensor = model(**inputs).logits
    return result


# qwen2: the library adds a token to the tokenizer of such a model, as real ones have it
@pytest.mark.parametrize("family", sorted(set(SUPPORTED) - {"qwen2"}))
def test_an_imported_folder_gives_the_same_logits_and_facts(family: str, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source-of-it", family, num_layers=2)
    lines = run_import(source, tmp_path)
    result = lines[-1]
    assert isinstance(result, ResultLine)
    assert result.facts == model_facts(tmp_path / result.folder).model_dump()
    assert result.facts["tokenizer_sha256"] == model_facts(source).tokenizer_sha256
    assert torch.equal(logits(tmp_path / result.folder), logits(source))


@pytest.mark.parametrize("family", ["t5", "bart", "encoder-decoder"])
def test_an_answer_that_begins_behind_no_token_is_refused(family: str, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "start", family, num_layers=1)
    edit(source / "config.json", decoder_start_token_id=4000)
    with pytest.raises(BrokenFile, match="decoder_start_token_id"):
        run_import(source, tmp_path / "out")


def test_a_start_token_that_only_the_generation_settings_name_is_put_into_the_config(
    tmp_path: Path,
) -> None:
    source = save_tiny(tmp_path / "start", "encoder-decoder", num_layers=1)
    named = json.loads((source / "generation_config.json").read_text())["decoder_start_token_id"]
    edit(source / "config.json", decoder_start_token_id=None)
    run_import(source, tmp_path / "out")
    assert read_config(tmp_path / "out" / "model").decoder_start_token_id == named == 2


def test_a_bert_without_its_language_model_head_is_refused(
    tiny_bert_dir: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_bert_dir, tmp_path / "bert"))
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "cls.predictions" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BrokenFile, match=r"cls\.predictions"):
        run_import(folder, tmp_path / "out")


def test_a_tokenizer_wider_than_the_decoder_is_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "pair", "encoder-decoder", num_layers=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(BrokenFile, match="embedding rows"):
        run_import(folder, tmp_path / "out")


def test_weights_in_several_files_become_one(tiny_llama_dir: Path, tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(tiny_llama_dir).save_pretrained(
        sharded, max_shard_size="200KB"
    )
    AutoTokenizer.from_pretrained(tiny_llama_dir).save_pretrained(sharded)
    assert len(list(sharded.glob("*.safetensors"))) > 1
    run_import(sharded, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out" / "model").glob("*.safetensors")] == [
        "model.safetensors"
    ]
    assert torch.equal(logits(tmp_path / "out" / "model"), logits(tiny_llama_dir))


def test_the_precision_is_kept(tiny_llama_dir: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.bfloat16).save_pretrained(half)
    AutoTokenizer.from_pretrained(tiny_llama_dir).save_pretrained(half)
    run_import(half, tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_percent_only_rises_and_ends_at_100(tiny_llama_dir: Path, tmp_path: Path) -> None:
    percents = [
        line.percent for line in run_import(tiny_llama_dir, tmp_path) if line.type == "progress"
    ]
    assert percents == sorted(percents)
    assert percents[-1] == 100


def test_an_unknown_architecture_is_refused(folder: Path, tmp_path: Path) -> None:
    edit(folder / "config.json", model_type="mamba", architectures=["MambaForCausalLM"])
    with pytest.raises(UnsupportedModel, match=r"mamba.*llama"):
        run_import(folder, tmp_path)


def test_code_of_its_own_is_never_run(folder: Path, tmp_path: Path) -> None:
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "evil.Evil"})
    with pytest.raises(UnsafeFile, match="auto_map"):
        run_import(folder, tmp_path)


def test_weights_without_a_layer_are_refused(folder: Path, tmp_path: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.3.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(BrokenFile, match=r"layers\.3|do not belong"):
        run_import(folder, tmp_path)


def test_weights_with_nan_are_refused(folder: Path, tmp_path: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(BrokenFile, match="NaN"):
        run_import(folder, tmp_path)


def test_a_configuration_that_claims_a_giant_is_refused_before_memory_is_taken(
    folder: Path, tmp_path: Path
) -> None:
    edit(
        folder / "config.json", hidden_size=65_536, intermediate_size=10**6, num_hidden_layers=1000
    )
    with pytest.raises(BrokenFile, match="do not belong together"):
        run_import(folder, tmp_path)


def test_a_tokenizer_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<more-{i}>" for i in range(8)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(BrokenFile, match="embedding rows"):
        run_import(folder, tmp_path)


def leave_out_ids(folder: Path, *, num_ids: int) -> None:
    """Moves the last tokens of the model's own vocabulary to ids further up."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    for token, token_id in vocabulary.items():
        if token_id >= len(vocabulary) - 4:
            vocabulary[token] = token_id + num_ids
    path.write_text(json.dumps(tokenizer))


def test_a_token_id_beyond_the_embedding_rows_is_refused_although_there_are_rows_enough(
    folder: Path, tmp_path: Path
) -> None:
    leave_out_ids(folder, num_ids=3)
    with pytest.raises(
        BrokenFile, match="token ids up to 386 but the model has only 384 embedding rows"
    ):
        run_import(folder, tmp_path)


def test_ids_that_are_left_out_below_the_embedding_rows_are_taken(
    folder: Path, tmp_path: Path
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(400)
    model.save_pretrained(folder)
    leave_out_ids(folder, num_ids=3)
    run_import(folder, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert (len(tokenizer), num_token_ids(tokenizer)) == (384, 387)


def test_two_tokens_with_one_id_are_refused(folder: Path, tmp_path: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary.update({token: 383 for token, token_id in vocabulary.items() if token_id == 382})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(BrokenFile, match="to two tokens"):
        run_import(folder, tmp_path)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for m in messages",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        # only on what is rendered beside the first sentence
        "{% if not messages[0].content %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}",
        "{{ 1 // (3 - messages | length) }}",
    ],
)
def test_a_chat_template_that_fails_escapes_or_never_ends_is_refused(
    folder: Path, tmp_path: Path, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.models.template_limits.CPU_SECONDS", 1)
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(BrokenFile, match="chat template"):
        run_import(folder, tmp_path)


def test_a_broken_tokenizer_is_a_reason_not_a_crash(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    with pytest.raises(WorkerError):
        run_import(folder, tmp_path)


def run_process(
    spec: dict[str, object], out: Path, prefix: tuple[str, ...] = ()
) -> tuple[int, list[RunLine]]:
    path = out.with_suffix(".json")
    path.write_text(json.dumps(spec))
    done = subprocess.run(
        [*prefix, sys.executable, "-m", "worker.import_model", str(path), "--out", str(out)],
        capture_output=True,
        text=True,
        check=False,
        env=dict(os.environ) | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    return done.returncode, [run_line.validate_json(line) for line in done.stdout.splitlines()]


def test_the_process_says_only_lines_and_ends_with_its_verdict(
    folder: Path, tmp_path: Path
) -> None:
    spec: dict[str, object] = {"format": "folder", "source_path": str(folder), "num_threads": 1}
    status, lines = run_process(spec, tmp_path / "good")
    assert (status, lines[-1].type) == (0, "result")
    (folder / "pytorch_model.bin").write_bytes(b"")
    status, lines = run_process(spec, tmp_path / "bad")
    assert status == 1
    assert isinstance(lines[-1], ErrorLine)
    assert (lines[-1].code, "pytorch_model.bin" in lines[-1].message) == ("unsafe_file", True)


def test_an_import_that_fills_the_disk_does_not_blame_the_model(
    folder: Path, tmp_path: Path
) -> None:
    spec: dict[str, object] = {"format": "folder", "source_path": str(folder), "num_threads": 1}
    limit = ("prlimit", "--fsize=4096")  # the kernel refuses longer files as it does on a full disk
    status, lines = run_process(spec, tmp_path / "out", limit)
    assert status == 1
    assert isinstance(lines[-1], ErrorLine)
    assert (lines[-1].code, "free some disk" in lines[-1].message) == ("disk_full", True)


def test_a_bert_with_no_more_than_a_vocabulary_is_taken(
    tiny_bert_dir: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_bert_dir, tmp_path / "bert"))
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "vocab.txt").write_text(
        "\n".join(sorted(vocabulary, key=vocabulary.__getitem__)) + "\n"
    )
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": False})
    )
    (folder / "spiece.model").write_bytes(b"of another library")
    run_import(folder, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    assert (
        tokenizer(SENTENCE).input_ids
        == AutoTokenizer.from_pretrained(tiny_bert_dir)(SENTENCE).input_ids
    )
    assert not (tmp_path / "out" / "model" / "spiece.model").exists()
