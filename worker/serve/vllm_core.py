"""Creates and frees vLLM's own engine object."""

import gc
import logging
from pathlib import Path
from typing import Any

from worker.serve.errors import ModelLoadFailed

MAX_LOGPROBS = 20  # alternatives that a request may ask for
# Size of the KV cache, relative to `max_running` full contexts. If it is full, new sequences wait.
CACHE_SHARE = 0.5

Vllm = Any  # vLLM is not installed where this is type-checked


def make_core(folder: Path, **options: Any) -> Vllm:  # Any: vLLM's own options
    """Returns an `LLMEngine` for the model of a folder. Raises ModelLoadFailed."""
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
            **options,
        ).create_engine_config()
        config.cache_config.kv_cache_memory_bytes = _cache_bytes(config)
        return LLMEngine(config, UniProcExecutor, log_stats=False, multiprocess_mode=False)
    except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        raise ModelLoadFailed(f"vLLM cannot load this model: {error}") from error


def _cache_bytes(config: Vllm) -> int:
    model, parallel = config.model_config, config.parallel_config
    values_per_token = (
        2
        * model.get_num_layers(parallel)
        * model.get_num_kv_heads(parallel)
        * model.get_head_size()
    )
    tokens_per_context = model.max_model_len + config.cache_config.block_size
    num_contexts = max(1, round(CACHE_SHARE * config.scheduler_config.max_num_seqs))
    bytes_per_token = values_per_token * model.dtype.itemsize
    return int(bytes_per_token * tokens_per_context * num_contexts)


def release_core(core: Vllm) -> None:
    """Frees the memory of an engine. vLLM's shutdown would end parts that other engines share."""
    core.engine_core._finalizer.detach()
    core.__dict__.clear()
    gc.unfreeze()  # vLLM hides its objects from the garbage collector
    gc.collect()
