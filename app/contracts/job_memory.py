"""Memory and disk of a training job, estimated from its numbers.

On a CPU the estimate is the peak resident memory of the run process: the largest of its phases. On
a GPU it is the memory of the device, which also decides where a run places its teacher
(worker.distill.training.devices).
"""

from dataclasses import dataclass

from app.contracts.memory.step_parts import (
    NO_FEATURES,
    FeatureBytes,
    feature_bytes,
    planned_parts,
    rollout_bytes,
)
from app.contracts.memory.teacher_weights import job_teacher_bytes
from app.contracts.model_sizes import LayerKind, ModelSizes
from app.contracts.planned_jobs import PlannedJob, RowCounts
from app.contracts.run_limits import (
    CPU_CHUNK_BYTES,
    DEVICE_CHUNK_BYTES,
    FIT_BYTES,
    FIT_ROWS,
    LOSS_CHUNKS,
    MAX_RUNNING,
)

MIB = 2**20
AUTOCAST_BYTES = 2
# A process that has imported its libraries, with its threads and its compiled kernels.
PROCESS_BYTES = 505 * MIB
# Memory of activations on a CPU, relative to `layer_values`: gradients exist beside them.
ACTIVATION_FACTOR = 1.15
# Results that an MLP without a gate keeps on a GPU, by its activation function: those in the dtype
# of autocast, and those in float32. The default is (2, 0).
ACTIVATION_VALUES = {"relu": (1, 0), "gelu_new": (2, 3)}
# After the last layer, in float32: input and result of the norm, the rows of the targets and their
# gradient.
FINAL_VALUES = 4
CHECKPOINT_BYTES = 6 * MIB  # tokenizer, state and manifest of a checkpoint


@dataclass(frozen=True)
class DeviceStudent:
    """A student on a GPU, in numbers.

    num_trained: Number of trained parameters.
    num_teacher_head: Size of the teacher's LM head, which is in float32 for the loss.
    row_tokens: Most tokens of a row. Only architectures with a position bias depend on it.
    source_share: Share of the tokens that the encoder of an encoder-decoder reads. None if it is
        unknown: the share that needs most memory counts.
    has_frozen_encoder: The encoder keeps nothing for the backward pass.
    trains_norms: False for LoRA. An RMS norm then keeps only its input.
    accumulates: A step may have several micro-batches. The gradients of the earlier ones then exist
        beside the activations of the next one.
    num_lowered: Number of parameters of layers with LoRA adapters, which are in bfloat16.
    features: Memory of feature losses.
    rollout_bytes: What the generation of rollouts needs beside the models, before a step.
    """

    sizes: ModelSizes
    num_trained: int
    trains_head: bool
    num_teacher_head: int
    row_tokens: int
    source_share: float | None = None
    has_frozen_encoder: bool = False
    trains_norms: bool = True
    accumulates: bool = False
    num_lowered: int = 0
    features: FeatureBytes = NO_FEATURES
    rollout_bytes: int = 0

    @property
    def resident_bytes(self) -> int:
        """Bytes that exist throughout: weights, both moments of AdamW, the teacher's head.

        Weights are float32, except those with LoRA adapters.
        """
        weights = 4 * self.sizes.num_parameters - (4 - AUTOCAST_BYTES) * self.num_lowered
        trained = self.num_trained + self.features.num_projections
        weights += 4 * self.features.num_projections
        return weights + 8 * trained + 4 * self.num_teacher_head

    def peak_bytes(
        self, batch_tokens: int, *, has_autocast: bool, has_checkpointing: bool = False
    ) -> int:
        """Returns the most memory that a training step needs.

        It is needed at one of these times. At the start of the backward pass, everything that the
        layers keep exists, and in the loss also its chunks or the LM head's gradient. At the end of
        the backward pass, the activations are gone and all gradients exist. Feature losses need the
        teacher's states while they are computed. Rollouts are generated before the step.
        """
        sizes, head = self.sizes, 4 * self.sizes.head_parameters * self.trains_head
        chunk = min(DEVICE_CHUNK_BYTES, 4 * sizes.vocab_size * batch_tokens)
        num_complete = 1 if has_checkpointing else None
        kept = self.kept_bytes(batch_tokens, has_autocast=has_autocast, num_complete=num_complete)
        more = batch_tokens * self.features.kept
        kept += more
        # the loss keeps the gradient of the head, and backpropagation multiplies it
        start = kept + head + max(LOSS_CHUNKS * chunk, head)
        if has_checkpointing:
            again = self.kept_bytes(batch_tokens, has_autocast=has_autocast, num_complete=2)
            start = max(start, again + more + head)
        end = 4 * (self.num_trained + self.features.num_projections)
        if sizes.is_tied:  # the gradient of the embedding is added to that of the head
            end += head
        features = kept + batch_tokens * (self.features.states + self.features.work)
        if self.accumulates:
            start += 4 * self.num_trained
            features += 4 * self.num_trained
        return self.resident_bytes + max(start, end, features, self.rollout_bytes)

    def kept_bytes(
        self, batch_tokens: int, *, has_autocast: bool, num_complete: int | None = None
    ) -> int:
        """Returns the bytes that a forward pass keeps for the backward pass.

        Autocast keeps a bfloat16 copy of every float32 matrix of the layers. With activation
        checkpointing, only `num_complete` layers of each stack keep everything: the last one, and
        the one that is run again. The others keep their input in float32.
        """
        sizes, stacks = self.sizes, self.sizes.stacks
        per_token, copies = [], 0
        for number, stack in enumerate(stacks):
            is_encoder = number < len(stacks) - 1
            if is_encoder and self.has_frozen_encoder:
                per_token.append(0)
                continue
            layer = layer_bytes(
                sizes,
                sizes.kinds[min(number, len(sizes.kinds) - 1)],
                has_autocast=has_autocast,
                row_tokens=self.row_tokens,
                num_attentions=1 if is_encoder or len(stacks) == 1 else 2,
                trains_norms=self.trains_norms,
            )
            num = stack.num_layers if num_complete is None else min(stack.num_layers, num_complete)
            num_inputs = 0 if num_complete is None else stack.num_layers - 1
            per_token.append(num * layer + num_inputs * 4 * sizes.hidden_size)
            has_copies = has_autocast and not self.num_lowered
            copies += AUTOCAST_BYTES * stack.num_parameters * num // stack.num_layers * has_copies
        if len(stacks) > 1 and num_complete is None:
            # keys and values of all cross-attentions
            per_token[0] += stacks[-1].num_layers * _cross_bytes(sizes, has_autocast=has_autocast)
        if len(stacks) == 1:
            kept = per_token[0]
        elif self.source_share is None:
            kept = max(per_token)
        else:
            share = self.source_share
            kept = round(share * per_token[0] + (1 - share) * per_token[-1])
        return batch_tokens * (kept + FINAL_VALUES * 4 * sizes.hidden_size) + copies

    def saved_bytes(self, batch_tokens: int, *, has_autocast: bool) -> int:
        """Returns the bytes that activation checkpointing saves."""
        plain, checkpointed = (
            self.peak_bytes(batch_tokens, has_autocast=has_autocast, has_checkpointing=is_on)
            for is_on in (False, True)
        )
        return max(0, plain - checkpointed)


def layer_bytes(
    sizes: ModelSizes,
    kind: LayerKind,
    *,
    has_autocast: bool,
    row_tokens: int,
    num_attentions: int = 1,
    trains_norms: bool = True,
) -> int:
    """Returns the bytes per token that a layer of a GPU keeps for the backward pass.

    The residual stream and the norms are float32. Under autocast, every matrix that reads a norm's
    result keeps a bfloat16 copy of it. Attention is fused: it keeps its inputs and its result, and
    with a position bias the bias of each layer. The MLP keeps the results of its elementwise
    operations.
    """
    H, value = sizes.hidden_size, AUTOCAST_BYTES if has_autocast else 4
    norm = 4 * H * (2 if kind.has_rms_norm and trains_norms else 1)

    def inputs(num_matrices: int) -> int:
        """Returns the bytes of a norm's result, as these matrices keep it."""
        return AUTOCAST_BYTES * H * num_matrices if has_autocast else 4 * H

    attention = norm + inputs(1 if kind.is_joined else 3) + value * (2 * H + 2 * sizes.kv_size)
    bias = value * sizes.num_heads * row_tokens * kind.has_position_bias
    num_rounded, num_exact = ACTIVATION_VALUES.get(kind.activation, (2, 0))
    if kind.is_gated:
        more = (1, 1) if num_exact else (2, 0)
        num_rounded, num_exact = num_rounded + more[0], num_exact + more[1]
    mlp = norm + inputs(2 if kind.is_gated else 1)
    mlp += sizes.mlp_size * (value * num_rounded + 4 * num_exact)
    return num_attentions * attention + bias + mlp


def _cross_bytes(sizes: ModelSizes, *, has_autocast: bool) -> int:
    """Returns the bytes per source token that a cross-attention keeps: inputs, keys and values."""
    if not has_autocast:
        return 4 * 2 * sizes.kv_size
    return AUTOCAST_BYTES * (2 * sizes.hidden_size + 2 * sizes.kv_size)


def layer_values(hidden_size: int, mlp_size: int) -> int:
    """Returns the number of activations per token that a layer keeps for the backward.

    For estimates of CPUs. It covers norms, queries, keys, values, attention and a gated MLP.
    """
    return 10 * hidden_size + 4 * mlp_size


def device_bytes(job: PlannedJob, rows: RowCounts, *, has_bfloat16: bool) -> int:
    """Returns the least GPU memory of a job.

    The teacher runs before or beside the student, which recomputes its activations.
    """
    h, sizes = job.block.hyperparameters, job.students[-1]
    value_bytes = 2 if has_bfloat16 else 4
    parts = planned_parts(job.block, longest_tokens=rows.longest_tokens)
    student = DeviceStudent(
        sizes=sizes,
        num_trained=job.trained[-1],
        trains_head=job.trains_head,
        num_teacher_head=job.teacher.head_parameters if job.has_teacher else 0,
        row_tokens=rows.longest_tokens,
        source_share=1 - min(1.0, rows.train_targets / max(1, rows.train_tokens)),
        has_frozen_encoder=job.block.student.freeze_encoder,
        trains_norms=job.block.student.init != "lora",
        accumulates=h.batch_tokens == "auto" or h.batch_rows is not None,
        num_lowered=num_lowered(job) if has_bfloat16 else 0,
        features=feature_bytes(
            parts, sizes, job.teacher, row_tokens=rows.longest_tokens, value_bytes=value_bytes
        ),
        rollout_bytes=rollout_bytes(sizes, parts.rollouts),
    )
    tokens = max(job.batch_tokens, rows.longest_tokens)
    student_bytes = student.peak_bytes(tokens, has_autocast=has_bfloat16, has_checkpointing=True)
    if not job.has_teacher:
        return student_bytes
    teacher_bytes = job_teacher_bytes(job, value_bytes)
    teacher_bytes += tokens * layer_values(job.teacher.hidden_size, job.teacher.mlp_size) * 4
    teacher_bytes += answer_bytes(job, rows, value_bytes)
    return student_bytes + teacher_bytes if job.keeps_teacher else max(student_bytes, teacher_bytes)


def num_lowered(job: PlannedJob) -> int:
    """Returns the parameters of the largest student that a GPU with bfloat16 keeps in bfloat16.

    They are those of the layers if the job trains LoRA adapters. The few norms count, too.
    """
    is_lora = job.block.student.init == "lora"
    return job.students[-1].layer_parameters if is_lora else 0


def least_device_bytes(job: PlannedJob, rows: RowCounts) -> int:
    """Returns the GPU memory without which a job cannot run: that of its largest student.

    Counts weights and moments, and the larger of two: the gradients, or the inputs of the layers for
    one micro-batch, which activation checkpointing keeps. Weights with LoRA adapters are counted in
    bfloat16. The teacher can run on the CPU, and the chunks of the loss can be smaller than usual.
    A batch is at least half full unless a single row is longer, and an automatic one can be divided.
    A token passes through only one stack of an encoder-decoder, perhaps a frozen one, so activations
    are left out there.
    """
    sizes, trained = job.students[-1], job.trained[-1]
    num_layers = sizes.num_layers if len(sizes.stacks) == 1 else 0
    batch_tokens = job.block.hyperparameters.batch_tokens
    batch_tokens = 0 if batch_tokens == "auto" else batch_tokens
    tokens = max(min(batch_tokens, rows.train_tokens) // 2, rows.longest_tokens)
    per_token = 4 * num_layers * sizes.hidden_size
    weights = sizes.num_bytes - (4 - AUTOCAST_BYTES) * num_lowered(job)
    return weights + 8 * trained + max(4 * trained, tokens * per_token)


def cpu_bytes(job: PlannedJob, rows: RowCounts, *, has_bfloat16: bool) -> int:
    """Returns the peak resident memory of the run process on a CPU."""
    return PROCESS_BYTES + max(cpu_phases(job, rows, has_bfloat16=has_bfloat16).values())


def mapped_bytes(job: PlannedJob) -> int:
    """Returns the least part of `cpu_bytes` that the system can take back from a run.

    Weights that are only read are mapped from their files. They count as resident memory, but the
    system can drop their pages and read them again. Quantised weights are not mapped.
    """
    has_mapped_teacher = job.has_teacher and job.block.teacher_precision == "auto"
    return max(job.start.num_bytes, job.teacher.num_bytes if has_mapped_teacher else 0)


def cpu_phases(job: PlannedJob, rows: RowCounts, *, has_bfloat16: bool) -> dict[str, int]:
    """Returns the memory of each phase of a run, without that of an idle process.

    A model that only runs forward has packed weights beside the plain ones. The choice of layers,
    the student and layer fitting each map the file of the start model.
    """
    sizes, trained = job.students[-1], job.trained[-1]
    packed = 0.5 if has_bfloat16 else 1.0
    teacher_bytes = _packed_teacher_bytes(job, packed) if job.has_teacher else 0
    teacher_head = 4 * job.teacher.head_parameters if job.uses_rows_of_teacher else 0
    value_bytes = 2 if has_bfloat16 else 4  # of the KV cache
    tokens = max(min(job.batch_tokens, rows.train_tokens), rows.longest_tokens)
    per_token = 4 * sizes.num_layers * layer_values(sizes.hidden_size, sizes.mlp_size)
    activations = round(ACTIVATION_FACTOR * tokens * per_token)
    chunk = min(CPU_CHUNK_BYTES, 4 * sizes.vocab_size * tokens)
    loss = chunk * (1 if job.has_expected_rows else 2)
    loss += 4 * sizes.head_parameters * job.trains_head
    training = sizes.num_bytes + 12 * trained + activations + loss
    phases = {
        "training": training + teacher_head,
        "evaluation": teacher_head
        + chunk
        + max(_packed_bytes(sizes.num_bytes, packed), teacher_bytes, job.start.num_bytes * 2)
        + evaluation_cache_bytes(job, rows, value_bytes),
    }
    if job.has_teacher:
        answers = answer_bytes(job, rows, value_bytes)
        phases["teacher"] = teacher_bytes + teacher_head + max(chunk, answers)
    if job.uses_rows_of_teacher:  # the first epoch computes the rows that are not in the cache
        phases["training"] += teacher_bytes
    if job.fits_layers:
        start = _packed_bytes(job.start.num_bytes, packed)
        chosen = start if job.block.student.layer_choice != "first_and_last" else 0
        per_row = rows.train_tokens // max(1, rows.num_train)
        num_fit = FIT_ROWS if job.block.student.fit_rows == "auto" else job.block.student.fit_rows
        num_tokens = min(num_fit, rows.num_train) * per_row
        streams = min(FIT_BYTES, num_tokens * 8 * sizes.hidden_size * sizes.num_layers)
        work = num_tokens * 4 * (4 * sizes.hidden_size + 4 * sizes.mlp_size)
        loaded = start + chosen + job.start.num_bytes
        phases["layer_fit"] = sizes.num_bytes + loaded + streams + work + teacher_head
    return phases


def kv_cache_bytes(model: ModelSizes, num_sequences: float, length: float, value_bytes: int) -> int:
    """Returns the size of the keys and values of sequences that are decoded together."""
    per_token = 2 * model.stacks[-1].num_layers * model.kv_size * value_bytes
    return round(min(MAX_RUNNING, num_sequences) * length * per_token)


def answer_bytes(job: PlannedJob, rows: RowCounts, value_bytes: int) -> int:
    """Returns the KV cache of the teacher while it answers the rows, 0 if it does not.

    The longest answers of a batch decide how wide the cache is (app.contracts.job_seconds).
    """
    length = rows.prompt_tokens + min(job.block.data.max_new_tokens, 1.5 * rows.answer_tokens)
    return kv_cache_bytes(job.teacher, rows.num_unanswered, length, value_bytes)


def evaluation_cache_bytes(job: PlannedJob, rows: RowCounts, value_bytes: int) -> int:
    """Returns the largest KV cache of a model that answers held-out prompts."""
    number, new_tokens = job.evaluated_answers(rows)
    length = rows.prompt_tokens + min(new_tokens, 1.5 * rows.answer_tokens)
    models = [job.start, *([job.teacher] if job.has_teacher else [])]
    return max(kv_cache_bytes(model, number, length, value_bytes) for model in models)


def _packed_bytes(plain_bytes: int, packed: float) -> int:
    return round(plain_bytes * (1 + packed))


def _packed_teacher_bytes(job: PlannedJob, packed: float) -> int:
    """Returns the memory of the teacher on a CPU.

    Of a quantised one only the LM head is packed. One in int4 is bfloat16 otherwise, and not packed.
    """
    if job.block.teacher_precision == "auto":
        return _packed_bytes(job.teacher.num_bytes, packed)
    if job.block.teacher_precision == "int4":
        return job_teacher_bytes(job, 2)
    return job_teacher_bytes(job, 4) + 4 * job.teacher.head_parameters


def disk_bytes(job: PlannedJob, rows: RowCounts, *, keep_checkpoints: int) -> int:
    """Returns the disk space that a job needs in addition: checkpoints, teacher's rows, the model.

    Checkpoints are weights and two Adam moments in float32. One more than is kept exists while the
    next one is written, and each may hold an older, better student. The checkpoints of a LoRA job
    have the adapters in place of weights, and the run has a copy of the merged model.
    """
    sizes, trained = job.students[-1], job.trained[-1]
    is_lora = job.block.student.init == "lora"
    saved = 4 * trained if is_lora else sizes.num_bytes
    checkpoint = 2 * saved + 8 * trained + CHECKPOINT_BYTES
    models = sum(student.num_bytes for student in job.students) * (2 if is_lora else 1)
    exports = {"gguf_f16": 0.5, "gguf_q8_0": 0.27}
    models += round(sum(exports[name] for name in job.block.export) * sizes.num_bytes)
    return (keep_checkpoints + 1) * checkpoint + models + cache_bytes(job, rows)


def cache_bytes(job: PlannedJob, rows: RowCounts) -> int:
    """Returns the size of the cache of the teacher's rows: one float32 vector for each target."""
    if not job.uses_rows_of_teacher:
        return 0
    num_targets = rows.train_targets + rows.valid_targets
    return num_targets * (4 * job.teacher.hidden_size + 8)
