"""Cases of generation: on-policy training, and the decoder of the serving engine."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from transformers import LlamaConfig

from app.contracts.distillation import Data, Objective
from app.contracts.generation import Sampling
from tests.device.fake_cuda import fake_cuda
from tests.device.fake_graphs import SEGMENT_BYTES, fake_graphs
from tests.device.memory_log import MemoryLog, fused_attention
from tests.device.op_log import OpLog
from tests.device.sizes import NUM_ANSWER_TOKENS
from tests.device.trainers import NUM_TOKENS, rows, trainer_of
from worker.distill.losses.divergences import TokenObjective
from worker.distill.losses.lm_head import TeacherRows
from worker.distill.losses.uld import teacher_loss
from worker.distill.students.recipe import load_model
from worker.distill.training.rollouts import RolloutPlan
from worker.serve.cuda_graphs import DRIVER_BYTES
from worker.serve.decoding import grouped_attention
from worker.serve.decoding.cursor_batch import COLUMN_BUCKET, CursorBatch
from worker.serve.decoding.decoder import Decoder, Sequence
from worker.serve.decoding.grouped_attention import use_grouped_attention
from worker.serve.decoding.logit_processors import LogitsProcessor
from worker.serve.decoding.sampling import TokenSampler
from worker.serve.device_memory import PrefillMemory
from worker.train import EngineSampler

Json = dict[str, Any]  # Any: open-ended JSON
SAMPLERS: dict[str, Json] = {
    "greedy": {},
    "sampled": {"temperature": 0.7},
    "top_p": {"temperature": 0.7, "top_p": 0.9},
    "top_k": {"temperature": 0.7, "top_k": 20, "min_p": 0.1},
    "processed": {},  # with logit biases
    "logprobs": {"num_logprobs": 3},
}
NUM_GRAPH_STEPS = 6
ONE_BILLION: Json = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def on_policy_step(folders: Path) -> Json:
    """A step on answers that the student has generated."""
    with fake_cuda():
        examples = rows(12)
        plan = RolloutPlan(
            data=Data(completions="student", student_share=1.0, max_new_tokens=NUM_ANSWER_TOKENS),
            then=None,
            seed=0,
            train=examples[:8],
            teacher_train=examples[:8],
            max_tokens=128,
            num_tokens=NUM_TOKENS,
            sampler_for=EngineSampler,
        )
        trainer = trainer_of(folders / "llama", rollouts=plan)
        with OpLog():
            trainer._step(trainer._next_pieces())
        with OpLog() as generation:
            pieces = trainer._next_pieces()
        with OpLog() as step:
            trainer._step(pieces)
        return {
            "are_rollouts": all(piece.rollouts for piece in pieces),
            "waits_of_generation": generation.waits,
            "waits_of_step": step.waits,
        }


def two_tokenizers(folders: Path) -> Json:
    """The loss of a pair whose tokenizers differ.

    The teacher has rows for all targets, because a fake mask has no number of true entries.
    """
    with fake_cuda():
        trainer = trainer_of(folders / "llama")
        teacher = trainer_of(folders / "llama").setup.teacher
        assert teacher is not None
        (piece, *_) = trainer._next_pieces()
        batch = piece.batch
        num_aligned = batch.num_targets
        hidden_NH = torch.zeros(batch.num_targets, 64, device="cuda", requires_grad=True)
        mask_N = torch.arange(batch.num_targets) < num_aligned
        rows_M = TeacherRows(
            teacher.head, hidden_NH=torch.zeros(num_aligned, 64, device="cuda"), mask_N=mask_N
        )
        objective = TokenObjective.from_objective(Objective(teacher_signal="uld", ce_weight=0.5))
        with OpLog() as log:
            loss, _ = teacher_loss(
                hidden_NH, trainer.head, batch.targets_N, rows_M, objective, denominator=7
            )
            loss.backward()
        return {"waits": log.waits}


def decoding(folders: Path) -> Json:
    """Decode steps of a causal model, for each kind of sampler."""
    with fake_cuda():
        model = served(folders / "llama")
        return {
            name: steps_of(model, is_processed=name == "processed", **options)
            for name, options in SAMPLERS.items()
        }


def served(folder: Path) -> Any:  # Any: transformers is untyped here
    """Returns a model as a serve worker loads it on a card."""
    model = load_model(folder, torch.bfloat16).to("cuda").eval().requires_grad_(False)
    use_grouped_attention(model)
    return model


def steps_of(model: Any, *, is_processed: bool, **options: Any) -> Json:
    """Observes a prefill of prompts of different lengths, and the second decode step after it."""
    decoder = Decoder(model, max_running=4, max_context_tokens=256, steps="plain")
    for number, length in enumerate((5, 70, 30)):
        decoder.add(
            Sequence(
                request_id=str(number),
                prompt=tuple(range(5, 5 + length)),
                max_tokens=8,
                end_ids=frozenset(),
                sampler=TokenSampler(processor=biased() if is_processed else None, **options),
            )
        )
    with OpLog() as prefill:
        decoder.step()
    with OpLog():
        decoder.step()
    with OpLog() as step:
        decoder.step()
    window = decoder.batch.cache.window
    layer = decoder.batch.cache.layers[0]
    num_rows, num_key_heads, num_columns, width = layer.keys.shape
    num_heads = model.config.num_attention_heads
    assert num_heads > num_key_heads
    repeated = (num_rows, num_heads, num_columns, width)
    return {
        "prefill_waits": prefill.waits,
        "step_waits": step.waits,
        "num_running": decoder.num_running,
        "num_columns": window.end - window.low,
        "num_used": decoder.batch.cursor - decoder.batch.low,
        "bucket": COLUMN_BUCKET,
        "cache": [str(layer.keys.dtype), layer.keys.device.type],
        "has_repeated_keys": any(shape == repeated for _, shape in step.shapes),
        "matmul_dtypes": step.num_of_dtypes("mm"),
    }


def graphs(folders: Path) -> Json:
    """Decode steps with CUDA graphs, of each family that has a folder."""
    seen: Json = {}
    for family in ("llama", "t5"):
        with fake_cuda(), fake_graphs() as graph:
            seen[family] = graphs_of(served(folders / family), graph)
    return seen


def graphs_of(model: Any, graph: Any) -> Json:
    """Observes decode steps of three rows: of each shape one is plain, and one is recorded."""
    decoder = Decoder(model, max_running=4, max_context_tokens=256)
    for number, length in enumerate((5, 60, 30)):
        decoder.add(
            Sequence(
                request_id=str(number),
                prompt=tuple(range(5, 5 + length)),
                max_tokens=100,
                end_ids=frozenset(),
                sampler=TokenSampler(),
            )
        )
    with OpLog():
        decoder.step()
    waits = []
    for _ in range(NUM_GRAPH_STEPS):
        with OpLog() as step:
            decoder.step()
        waits.append(len(step.waits))
    static = decoder.batch.static
    assert static is not None
    assert static.graphs is not None
    assert static.logits_PV is not None
    shared = static.num_bytes - static.logits_PV.nbytes
    return {
        "step_waits": waits,
        "num_recorded": len(graph.recorded),
        "num_replays": graph.num_replays,
        "waits": [wait for log in graph.recorded for wait in log.waits],
        "cpu_ops": sorted(
            {op for log in graph.recorded for op, at, _ in log.num_ops if at != "cuda"}
        ),
        "num_ops": [sum(log.num_ops.values()) for log in graph.recorded],
        "is_counted": shared == SEGMENT_BYTES + DRIVER_BYTES * len(static.graphs),
    }


def prefill_memory(folders: Path) -> Json:
    """The memory of prefills of a model with 1.2 billion parameters, and their estimates.

    Copies for the prefix cache are made after the last layer. They are left out.
    """
    folder = folders / "1B"
    LlamaConfig(**ONE_BILLION).save_pretrained(folder)
    with fake_cuda(), fused_attention():
        model = served(folder)
        needs = PrefillMemory.of(model)
        return {
            name: {
                "traced": activations_of(model, lengths),
                "estimated": needs.num_bytes(len(lengths) * max(lengths), max(lengths)),
            }
            for name, lengths in {"one": (2048,), "padded": (2048, 1000, 1500, 700)}.items()
        }


def activations_of(model: Any, lengths: tuple[int, ...]) -> int:
    """Returns the largest sum of live storages of a prefill, beside weights and the KV cache."""
    batch = CursorBatch(model, max_rows=len(lengths), max_width=2 * max(lengths), steps="plain")
    batch.cache.is_static = True  # keeps its buffers
    batch.join([[5]] * len(lengths))
    batch.cache.reserve(len(lengths), batch.max_width)
    for _ in lengths:
        batch.leave(0)
    batch.cursor = batch.max_width  # no room has to be made
    log = MemoryLog()
    log.watch(iter([*model.parameters(), *model.buffers()]))
    log.watch(buffer for layer in batch.cache.layers for buffer in layer._buffers)
    before = log.live_bytes
    attention = nn.functional.scaled_dot_product_attention  # fused by the caller
    with (
        patch.object(grouped_attention, "scaled_dot_product_attention", attention),
        patch.object(batch.prefixes, "keep"),
        log,
    ):
        batch.join([[5] * length for length in lengths])
    return log.peak_bytes - before


def biased() -> LogitsProcessor:
    """Returns a processor with biases and penalties."""
    sampling = Sampling(logit_bias=((7, 2.0),), repetition_penalty=1.2, max_tokens=8)
    return LogitsProcessor(sampling, context=(5, 6), end_ids=frozenset())


CASES = (on_policy_step, two_tokenizers, decoding, graphs, prefill_memory)
