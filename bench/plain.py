"""The same step written plainly in torch, the teacher live, for models TRL cannot train: `python -m bench.plain TASK.json`.

B batch, T tokens, S source tokens, N rows (targets), V vocabulary.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from bench.cases import Entry
from bench.process import peak_bytes, versions


def load(folder: str) -> Any:  # Any: transformers is untyped here
    is_seq2seq = AutoConfig.from_pretrained(folder).is_encoder_decoder
    kind = AutoModelForSeq2SeqLM if is_seq2seq else AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


def tensors(rows: list[Entry]) -> tuple[Entry, Tensor]:
    """The model's arguments for rows of equal length, and where it predicts targets."""
    ids_BT = torch.tensor([row["token_ids"][:-1] for row in rows])
    keep_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    for b, row in enumerate(rows):
        for start, end in row["spans"]:
            keep_BT[b, start - 1 : end - 1] = True
    if not rows[0]["source_ids"]:
        return {
            "input_ids": ids_BT,
            "attention_mask": torch.ones_like(ids_BT),
            "use_cache": False,
        }, keep_BT
    source_BS = torch.tensor([row["source_ids"] for row in rows])
    source = {"input_ids": source_BS, "attention_mask": torch.ones_like(source_BS)}
    return {**source, "decoder_input_ids": ids_BT, "use_cache": False}, keep_BT


def divergence(student_NV: Tensor, teacher_NV: Tensor, *, name: str) -> Tensor:
    log_q_NV, log_p_NV = student_NV.log_softmax(-1), teacher_NV.log_softmax(-1)

    def kl(log_from_NV: Tensor, log_to_NV: Tensor) -> Tensor:
        return functional.kl_div(log_to_NV, log_from_NV, reduction="none", log_target=True).sum(-1)

    if name == "forward_kl":
        return kl(log_p_NV, log_q_NV).mean()
    log_m_NV = torch.logsumexp(torch.stack([log_p_NV, log_q_NV]), dim=0) - torch.tensor(2.0).log()
    return (0.5 * kl(log_p_NV, log_m_NV) + 0.5 * kl(log_q_NV, log_m_NV)).mean()


def time_steps(task: Entry) -> Entry:
    torch.set_num_threads(task["num_threads"])
    rows = json.loads(Path(task["rows_path"]).read_text())["rows"]
    teacher, student = load(task["teacher_dir"]).requires_grad_(False), load(task["student_dir"])
    student.get_output_embeddings().requires_grad_(task["contender"]["trains_head"])
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=task["learning_rate"], betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    seconds, losses = [], []
    for indices in task["batches"]:
        arguments, keep_BT = tensors([rows[i] for i in indices])
        begun = time.perf_counter()
        student_NV = student(**arguments).logits[keep_BT]
        with torch.no_grad():
            teacher_NV = teacher(**arguments).logits[keep_BT]
        loss = divergence(student_NV, teacher_NV, name=task["contender"]["divergence"])
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        seconds.append(time.perf_counter() - begun)
    return {
        "seconds": seconds,
        "losses": losses,
        "peak_bytes": peak_bytes(),
        "versions": versions(),
    }


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    Path(task["answer"]).write_text(json.dumps(time_steps(task)))


if __name__ == "__main__":
    main()
