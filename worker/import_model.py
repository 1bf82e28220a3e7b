"""Import process: converts an untrusted model to a checkpoint that can be trained and served.

Usage: `python -m worker.import_model SPEC.json --out DIR`. Only checked files are read. The saved
checkpoint is loaded again, and its logits must equal those of the source. Weights are mapped from
their files, and at most one of the two models is in memory.
"""

from app.fast_imports import imports_done  # isort: split

import argparse
import gc
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from pydantic import BaseModel
from transformers import AutoTokenizer, EncoderDecoderModel

from app.settings import get_settings
from worker.disk import is_disk_full
from worker.errors import BrokenFile, DiskFull, MissingFile, UnsupportedTokenizer, WorkerError
from worker.models.architectures import context_tokens, kind_of, model_class, read_config
from worker.models.archives import unpack
from worker.models.artifact_checks import read_safetensors_header, take_in, weight_files
from worker.models.gguf_reader import check_gguf, load_gguf_model, load_gguf_tokenizer
from worker.models.hub import fetch_from_hub
from worker.models.licenses import checked_license, license_of
from worker.models.model_facts import chat_cost, model_facts, supported_config, writing_half
from worker.models.template_limits import bounded
from worker.models.vocabulary import num_token_ids
from worker.protocol.import_spec import ImportSpec
from worker.protocol.run_lines import (
    ErrorLine,
    MessageLine,
    ProgressLine,
    ResultLine,
    Sink,
    StageLine,
    take_over_stdout,
)

imports_done()

SENTENCE = "1. The capital of France is Paris, and 12 + 7 is 19.\n\n2. Ask a short question."
MODEL, SOURCE = "model", "source"  # subfolders of the run's output folder
# transformers sets `model_max_length` to a far larger number if the tokenizer has no limit.
UNSET_LENGTH = 10**9


@contextmanager
def foreign_files() -> Iterator[None]:
    """Converts errors of the model libraries to BrokenFile.

    For inconsistent files the libraries raise many types of errors, which are not told apart.
    """
    try:
        yield
    except (WorkerError, FileNotFoundError):
        raise
    except BaseException as error:
        # PanicException comes from the Rust code of tokenizers and is no subclass of Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise BrokenFile(
            f"transformers cannot load the model: {type(error).__name__}: {str(error)[:500]}"
        ) from error


@foreign_files()
def import_model(spec: ImportSpec, out: Path, sink: Sink) -> None:
    """Writes the checkpoint to out/model and sends a ResultLine to `sink`. Raises WorkerError."""
    source: dict[str, str] = {"format": spec.format}
    if spec.format == "gguf":
        assert spec.source_path is not None
        license_ = _convert_gguf(spec.source_path, out / MODEL, sink)
    else:
        folder = spec.source_path
        if spec.hub is not None:
            folder = out / "fetched"
            source |= {"hub": spec.hub, "commit": _fetch(spec.hub, folder, sink)}
        elif spec.format == "archive":
            assert spec.source_path is not None
            sink(StageLine(name="unpacking"))
            folder = unpack(
                spec.source_path, out / "unpacked", max_bytes=get_settings().max_import_bytes
            )
        assert folder is not None
        sink(StageLine(name="converting"))
        sink(ProgressLine(percent=42))
        license_ = license_of(folder)
        take_in(folder, out / SOURCE)
        _convert_folder(out / SOURCE, out / MODEL, sink)
    if license_ is not None:
        source["license"] = license_
    sink(ProgressLine(percent=95))
    facts = model_facts(out / MODEL)
    sink(ProgressLine(percent=100))
    sink(
        ResultLine(
            folder=MODEL,
            facts=facts.model_dump(),
            result={"source": source, "max_logit_difference": 0.0},
        )
    )


def _fetch(hub: str, folder: Path, sink: Sink) -> str:
    sink(StageLine(name="fetching"))
    settings = get_settings()

    def report(done: int, total: int) -> None:
        """Sends a progress line: the download is the first 40 percent of the import."""
        sink(ProgressLine(percent=40 * done / max(total, 1)))

    commit = fetch_from_hub(
        hub,
        folder,
        endpoint=settings.hf_endpoint or None,
        token=settings.hf_token or None,
        on_progress=report,
    )
    sink(MessageLine(message=f"fetched {hub} at commit {commit}", data={"commit": commit}))
    return commit


def _convert_gguf(path: Path, target: Path, sink: Sink) -> str | None:
    """Converts the file to a folder, and returns the licence that it names, if any."""
    sink(StageLine(name="converting"))
    header = check_gguf(path)
    sink(
        MessageLine(
            message="converting the GGUF file to float32; this may take several minutes",
            data={"bytes": path.stat().st_size},
        )
    )
    sink(ProgressLine(percent=5))
    tokenizer = load_gguf_tokenizer(path, header)
    sink(ProgressLine(percent=25))
    loaded, plain = load_gguf_model(path)
    sink(ProgressLine(percent=75))
    _save(plain, tokenizer, target)
    del plain
    expected = _logits_of(loaded, tokenizer)
    del loaded
    gc.collect()  # modules form reference cycles, and two models may not fit into memory
    sink(ProgressLine(percent=85))
    _check_reload(expected, tokenizer, target)
    return checked_license(header.metadata.get("general.license"))


def _convert_folder(source: Path, target: Path, sink: Sink) -> None:
    config = supported_config(source)
    _check_size(config, source)
    tokenizer = AutoTokenizer.from_pretrained(
        source, trust_remote_code=False, local_files_only=True, use_fast=True
    )
    sink(ProgressLine(percent=50))
    model, report = model_class(config).from_pretrained(
        source,
        dtype="auto",
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
    )
    if report["missing_keys"]:
        raise BrokenFile(
            f"the weights lack {', '.join(sorted(report['missing_keys'])[:3])}; the export is incomplete"
        )
    sink(ProgressLine(percent=70))
    _save(model, tokenizer, target)
    expected = _logits_of(model, tokenizer)
    del model
    gc.collect()  # modules form reference cycles, and two models may not fit into memory
    sink(ProgressLine(percent=80))
    _check_reload(expected, tokenizer, target)


def _check_size(config: Any, source: Path) -> None:  # Any: transformers is untyped here
    """Raises BrokenFile if the configuration describes far more parameters than the files hold.

    transformers would allocate and randomly initialise the missing parameters.
    """
    with torch.device("meta"):
        kind = model_class(config)
        empty = kind(config=config) if kind is EncoderDecoderModel else kind.from_config(config)
        claimed = sum(p.numel() for p in empty.parameters())
    sizes = [
        t.num_elements
        for file in weight_files(source)
        for t in read_safetensors_header(file).values()
    ]
    held = sum(sizes)
    # One more tensor is allowed: an LM head that is tied to the embedding is not in the files.
    if claimed > held + max(sizes, default=0):
        raise BrokenFile(
            f"config.json describes {claimed} parameters, but the weights have {held}; they do not belong together"
        )


def _save(model: Any, tokenizer: Any, target: Path) -> None:  # Any: transformers is untyped here
    if not getattr(tokenizer, "is_fast", False):
        raise UnsupportedTokenizer(
            "the tokenizer is not a fast tokenizer (tokenizer.json); save it as one and import the model again"
        )
    rows = min(model.get_input_embeddings().weight.shape[0], writing_half(model.config).vocab_size)
    if (num_ids := num_token_ids(tokenizer)) > rows:
        raise BrokenFile(
            f"the tokenizer has token ids up to {num_ids - 1} but the model has only {rows} embedding rows"
        )
    if (shared := _shared_id(tokenizer)) is not None:
        raise BrokenFile(
            f"the tokenizer gives the id {shared} to two tokens; give each token its own id"
        )
    bad = [
        name for name, parameter in model.named_parameters() if not torch.isfinite(parameter).all()
    ]
    if bad:
        raise BrokenFile(f"the weights of {bad[0]} contain NaN or infinity; the export is damaged")
    if tokenizer.model_max_length > UNSET_LENGTH:
        tokenizer.model_max_length = context_tokens(model.config)
    _name_start(model)
    _check_template(tokenizer)
    # Arguments of loading are not settings of the tokenizer and must not be saved with it.
    for name in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(name, None)
    try:
        model.save_pretrained(target, max_shard_size="1000GB")
        tokenizer.save_pretrained(target)
    except (ValueError, StrictDataclassError) as error:  # e.g. an inconsistent generation config
        raise BrokenFile(f"the model cannot be saved: {str(error)[:300]}") from error


def _shared_id(tokenizer: Any) -> int | None:  # Any: transformers is untyped here
    """Returns an id that two tokens share, or None.

    Libraries number added tokens by the vocabulary's length. If ids have gaps, that id is in use.
    """
    counts = Counter(tokenizer.get_vocab().values())
    return next((token_id for token_id, count in counts.items() if count > 1), None)


def _name_start(model: Any) -> None:  # Any: transformers is untyped here
    """Sets `decoder_start_token_id` of a seq2seq model, the token that its answers start after.

    Raises BrokenFile if no configuration of the model names a valid token.
    """
    if kind_of(model.config) != "seq2seq":
        return
    places = (model.config, model.generation_config, writing_half(model.config))
    start = next(
        (
            token
            for place in places
            if (token := getattr(place, "decoder_start_token_id", None)) is not None
        ),
        None,
    )
    if not isinstance(start, int) or not 0 <= start < writing_half(model.config).vocab_size:
        raise BrokenFile(
            f"config.json gives {start} as decoder_start_token_id; set it to the token that answers start after"
        )
    model.config.decoder_start_token_id = start


def _check_template(tokenizer: Any) -> None:  # Any: transformers is untyped here
    """Raises BrokenFile if the chat template fails or does not end.

    It is checked here because this process can be killed without harm.
    """
    if not tokenizer.chat_template:
        return

    try:
        # transformers renders the template in an immutable Jinja sandbox.
        messages = [{"role": "user", "content": "Hello"}]
        with bounded():
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            chat_cost(tokenizer)  # `model_facts` calls it later without limits
    except Exception as error:
        raise BrokenFile(
            f"the chat template cannot render a user message: {str(error)[:300] or type(error).__name__}"
        ) from error


def _logits_of(model: Any, tokenizer: Any) -> torch.Tensor:  # Any: transformers is untyped here
    """Returns the logits of the model for one sentence, or of a seq2seq model for an answer to it."""
    tokens = tokenizer(SENTENCE, return_tensors="pt", add_special_tokens=False)["input_ids"]
    if not tokens.numel():
        raise UnsupportedTokenizer(
            "the tokenizer gives no tokens for an English sentence; it cannot be imported"
        )
    inputs = {"input_ids": tokens}
    if kind_of(model.config) == "seq2seq":
        inputs["decoder_input_ids"] = tokens
    with torch.inference_mode():
        logits: torch.Tensor = model.eval()(**inputs).logits
    return logits


def _check_reload(
    expected: torch.Tensor, tokenizer: Any, target: Path
) -> None:  # Any: transformers is untyped here
    """Checks that the saved model gives exactly the logits of the source on one sentence.

    Raises BrokenFile if they differ, and UnsupportedTokenizer if the token ids differ.
    """
    again = AutoTokenizer.from_pretrained(target, trust_remote_code=False, local_files_only=True)
    tokens = tokenizer(SENTENCE, add_special_tokens=False)["input_ids"]
    if again(SENTENCE, add_special_tokens=False)["input_ids"] != tokens:
        raise UnsupportedTokenizer(
            "the tokenizer gives different tokens after it has been saved; it cannot be imported without changes"
        )
    saved = model_class(read_config(target)).from_pretrained(
        target, dtype="auto", use_safetensors=True, trust_remote_code=False, local_files_only=True
    )
    difference = (expected - _logits_of(saved, tokenizer)).abs().max().item()
    if difference != 0.0:
        raise BrokenFile(
            f"the saved model differs from the source (largest logit difference {difference:.3g})"
        )


def main() -> int:
    """Runs an import and returns the exit status: 0 after a result line, 1 after an error line.

    Standard output gets the lines only; all other output goes to standard error.
    """
    parser = argparse.ArgumentParser(prog="python -m worker.import_model")
    parser.add_argument("spec", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    lines = take_over_stdout()
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING)

    def sink(line: BaseModel) -> None:
        """Writes one line as JSON."""
        lines.write(line.model_dump_json() + "\n")

    spec = ImportSpec.model_validate_json(arguments.spec.read_text())
    if spec.num_threads:
        torch.set_num_threads(spec.num_threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    try:
        import_model(spec, arguments.out, sink)
    except (WorkerError, OSError) as error:
        line = _error_line(error)
        if line is None:
            raise
        sink(line)
        return 1
    return 0


def _error_line(error: WorkerError | OSError) -> ErrorLine | None:
    """Returns the line for a permanent failure, or None if a retry may succeed."""
    if is_disk_full(error):
        message = "the worker's disk is full; free some disk space, then import the model again"
        return ErrorLine(code=DiskFull.code, message=message)
    if isinstance(error, WorkerError):
        return ErrorLine(code=error.code, message=str(error))
    if isinstance(error, FileNotFoundError):
        return ErrorLine(code=MissingFile.code, message=f"{error.filename} is missing")
    return None


if __name__ == "__main__":
    sys.exit(main())
