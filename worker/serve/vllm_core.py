"""Creates and frees vLLM's own engine object."""

import gc
import json
import logging
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from worker.serve.decoding.families import SEQ2SEQ
from worker.serve.errors import ModelLoadFailed

MAX_LOGPROBS = 20  # alternatives that a request may ask for
# Size of the KV cache, relative to `max_running` full contexts. If it is full, new sequences wait.
CACHE_SHARE = 0.5

Vllm = Any  # vLLM is not installed where this is type-checked


@dataclass(frozen=True)
class VllmDraft:
    """Folder of a draft model, and the number of tokens that it proposes at a time."""

    folder: Path
    num_tokens: int

    @property
    def config(self) -> dict[str, str | int]:
        """vLLM's `speculative_config`."""
        return {
            "method": "draft_model",
            "model": str(self.folder),
            "num_speculative_tokens": self.num_tokens,
        }


def has_vllm() -> bool:
    """Returns whether this environment can serve with vLLM."""
    return find_spec("vllm") is not None


def can_serve(folder: Path) -> bool:
    """Returns whether vLLM has the architecture of the model of a folder, and it is a decoder."""
    from vllm import ModelRegistry

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    known = ModelRegistry.get_supported_archs()
    is_known = any(name in known for name in config.get("architectures") or ())
    return is_known and config.get("model_type") not in SEQ2SEQ


def make_core(folder: Path, *, draft: VllmDraft | None = None, **options: Any) -> Vllm:
    """Returns an `LLMEngine` for the model of a folder. Raises ModelLoadFailed.

    `options` are vLLM's own, hence Any.
    """
    from vllm import EngineArgs
    from vllm.config.logging import LoggingConfig
    from vllm.config.structured_outputs import StructuredOutputsConfig
    from vllm.platforms import current_platform
    from vllm.usage import usage_lib
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    usage_lib._USAGE_STATS_ENABLED = False  # a worker contacts no other hosts
    theirs = logging.getLogger("vllm")  # its events use the handlers of the worker
    theirs.handlers.clear()  # added by the import of vLLM
    theirs.propagate = True
    theirs.setLevel(logging.WARNING)
    is_cpu = current_platform.is_cpu()
    try:
        config = EngineArgs(
            model=str(folder),
            tokenizer=str(folder),
            skip_tokenizer_init=False,  # its grammars need the tokenizer
            load_format="safetensors",
            trust_remote_code=False,
            generation_config="vllm",  # sampling parameters come from requests
            max_logprobs=MAX_LOGPROBS,
            distributed_executor_backend=UniProcExecutor,
            use_tqdm_on_load=False,
            # Otherwise the first request with a grammar chooses the backend for all others.
            structured_outputs_config=StructuredOutputsConfig(
                backend="guidance", disable_any_whitespace=True
            ),
            logging_config=LoggingConfig(configure_logging=False),
            disable_log_stats=True,
            dtype="float32" if is_cpu else "auto",
            enforce_eager=is_cpu,  # compilation is slow on a CPU
            # vLLM requires this fraction to be free at the start. The cache size is set below.
            gpu_memory_utilization=0.01,
            speculative_config=None if draft is None else draft.config,
            **options,
        ).create_engine_config()
        config.cache_config.kv_cache_memory_bytes = _cache_bytes(config)
        return LLMEngine(config, UniProcExecutor, log_stats=False, multiprocess_mode=False)
    except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        raise ModelLoadFailed(f"vLLM cannot load this model: {error}") from error


def _cache_bytes(config: Vllm) -> int:
    model = config.model_config
    bytes_per_token = _token_bytes(model, config.parallel_config)
    if (speculation := config.speculative_config) is not None:  # the draft shares the cache
        bytes_per_token += _token_bytes(
            speculation.draft_model_config, speculation.draft_parallel_config
        )
    tokens_per_context = model.max_model_len + config.cache_config.block_size
    num_contexts = max(1, round(CACHE_SHARE * config.scheduler_config.max_num_seqs))
    return int(bytes_per_token * tokens_per_context * num_contexts)


def _token_bytes(model: Vllm, parallel: Vllm) -> int:
    values_per_token = (
        2
        * model.get_num_layers(parallel)
        * model.get_num_kv_heads(parallel)
        * model.get_head_size()
    )
    return int(values_per_token * model.dtype.itemsize)


def release_core(core: Vllm) -> None:
    """Frees the memory of an engine. vLLM's shutdown would end parts that other engines share."""
    core.engine_core._finalizer.detach()
    core.__dict__.clear()
    gc.unfreeze()  # vLLM hides its objects from the garbage collector
    gc.collect()
