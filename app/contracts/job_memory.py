"""Memory and disk of a training job, estimated from its numbers.

On a CPU the estimate is the peak resident memory of the run process: the largest of its phases. On
a GPU it is the memory of the device, which also decides where a run places its teacher
(worker.distill.training.devices).
"""

from dataclasses import dataclass

from app.contracts.model_sizes import ModelSizes
from app.contracts.planned_jobs import PlannedJob, RowCounts
from app.contracts.run_limits import CPU_CHUNK_BYTES, FIT_BYTES, FIT_ROWS, LOSS_BYTES, MAX_RUNNING

MIB = 2**20
AUTOCAST_BYTES = 2
# A process that has imported its libraries, with its threads and its compiled kernels.
PROCESS_BYTES = 505 * MIB
# Memory of activations on a CPU, relative to `layer_values`: gradients exist beside them.
ACTIVATION_FACTOR = 1.15
CHECKPOINT_BYTES = 6 * MIB  # tokenizer, state and manifest of a checkpoint


@dataclass(frozen=True)
class DeviceStudent:
    """Numbers of a student on a GPU, and the size of the teacher's LM head beside it.

    num_lowered: Parameters with LoRA adapters, which are kept in bfloat16.
    """

    num_parameters: int
    num_trained: int
    num_trained_head: int
    num_layers: int
    num_stacks: int
    hidden_size: int
    layer_values: int
    num_teacher_head: int
    num_lowered: int = 0

    def activation_bytes(self, batch_tokens: int, *, has_autocast: bool) -> int:
        """Returns the bytes that all layers keep for the backward pass."""
        value_bytes = AUTOCAST_BYTES if has_autocast else 4
        return batch_tokens * self.num_layers * self.layer_values * value_bytes

    def checkpointed_bytes(self, batch_tokens: int, *, has_autocast: bool) -> int:
        """Returns the same with activation checkpointing.

        A layer keeps its input in float32. The last layer of each stack keeps everything, and so
        does the layer that is run again.
        """
        value_bytes = AUTOCAST_BYTES if has_autocast else 4
        num_complete = min(self.num_layers, self.num_stacks + 1)
        inputs = 4 * self.hidden_size * (self.num_layers - self.num_stacks)
        return batch_tokens * (num_complete * self.layer_values * value_bytes + inputs)

    def saved_bytes(self, batch_tokens: int, *, has_autocast: bool) -> int:
        """Returns the bytes that activation checkpointing saves."""
        plain = self.activation_bytes(batch_tokens, has_autocast=has_autocast)
        return max(0, plain - self.checkpointed_bytes(batch_tokens, has_autocast=has_autocast))


def device_student_bytes(student: DeviceStudent, *, batch_tokens: int, has_autocast: bool) -> int:
    """Returns the GPU memory of a student in training.

    4 bytes per parameter, 12 more if it is trained (gradient and the two moments of AdamW), and 2
    for the copy made by autocast. Parameters with LoRA adapters have 2 bytes and no copy. Added to
    these are the activations kept for the backward and the LM head's second gradient. The loss adds
    its chunks, and the teacher's LM head in float32.

    Attention scores are not counted, because fused attention does not keep them.
    """
    num_full = student.num_parameters - student.num_lowered
    total = 4 * num_full + AUTOCAST_BYTES * student.num_lowered + 12 * student.num_trained
    total += AUTOCAST_BYTES * num_full * has_autocast
    total += 4 * student.num_trained_head + LOSS_BYTES + 4 * student.num_teacher_head
    return total + student.activation_bytes(batch_tokens, has_autocast=has_autocast)


def layer_values(hidden_size: int, mlp_size: int) -> int:
    """Returns the number of activations per token that a layer keeps for the backward.

    The estimate covers norms, queries, keys, values, attention and a gated feed-forward part.
    """
    return 10 * hidden_size + 4 * mlp_size


def device_bytes(job: PlannedJob, rows: RowCounts, *, has_bfloat16: bool) -> int:
    """Returns the least GPU memory of a job.

    The teacher runs before or beside the student, which recomputes its activations.
    """
    sizes, trained = job.students[-1], job.trained[-1]
    student = DeviceStudent(
        num_parameters=sizes.num_parameters,
        num_trained=trained,
        num_trained_head=sizes.head_parameters if job.trains_head else 0,
        num_layers=sizes.num_layers,
        num_stacks=len(sizes.stacks),
        hidden_size=sizes.hidden_size,
        layer_values=layer_values(sizes.hidden_size, sizes.mlp_size),
        num_teacher_head=job.teacher.head_parameters if job.has_teacher else 0,
        num_lowered=num_lowered(job) if has_bfloat16 else 0,
    )
    tokens = max(job.batch_tokens, rows.longest_tokens)
    student_bytes = device_student_bytes(student, batch_tokens=tokens, has_autocast=has_bfloat16)
    student_bytes -= student.saved_bytes(tokens, has_autocast=has_bfloat16)
    if not job.has_teacher:
        return student_bytes
    value_bytes = 2 if has_bfloat16 else 4
    teacher_bytes = value_bytes * job.teacher.num_parameters
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

    Counts weights, gradients and moments, and for one batch the inputs of the layers, which
    activation checkpointing keeps. Weights are float32, with LoRA adapters bfloat16. The teacher can run on the CPU, and the chunks of the loss can
    be smaller than usual. A batch is at least half full unless a single row is longer. A token
    passes through only one stack of an encoder-decoder, perhaps a frozen one, so activations are
    left out there.
    """
    sizes, trained = job.students[-1], job.trained[-1]
    num_layers = sizes.num_layers if len(sizes.stacks) == 1 else 0
    tokens = max(min(job.batch_tokens, rows.train_tokens) // 2, rows.longest_tokens)
    per_token = 4 * num_layers * sizes.hidden_size
    weights = sizes.num_bytes - (4 - AUTOCAST_BYTES) * num_lowered(job)
    return weights + 12 * trained + tokens * per_token


def cpu_bytes(job: PlannedJob, rows: RowCounts, *, has_bfloat16: bool) -> int:
    """Returns the peak resident memory of the run process on a CPU."""
    return PROCESS_BYTES + max(cpu_phases(job, rows, has_bfloat16=has_bfloat16).values())


def mapped_bytes(job: PlannedJob) -> int:
    """Returns the least part of `cpu_bytes` that the system can take back from a run.

    Weights that are only read are mapped from their files. They count as resident memory, but the
    system can drop their pages and read them again.
    """
    return max(job.start.num_bytes, job.teacher.num_bytes if job.has_teacher else 0)


def cpu_phases(job: PlannedJob, rows: RowCounts, *, has_bfloat16: bool) -> dict[str, int]:
    """Returns the memory of each phase of a run, without that of an idle process.

    A model that only runs forward has packed weights beside the plain ones. The choice of layers,
    the student and layer fitting each map the file of the start model.
    """
    sizes, trained = job.students[-1], job.trained[-1]
    packed = 0.5 if has_bfloat16 else 1.0
    teacher_bytes = _packed_bytes(job.teacher.num_bytes, packed) if job.has_teacher else 0
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


def disk_bytes(job: PlannedJob, rows: RowCounts, *, keep_checkpoints: int) -> int:
    """Returns the disk space that a job needs in addition: checkpoints, teacher's rows, the model.

    Checkpoints are weights and two Adam moments in float32. One more than is kept exists while the
    next one is written, and each may hold an older, better student.
    """
    sizes, trained = job.students[-1], job.trained[-1]
    checkpoint = 2 * sizes.num_bytes + 8 * trained + CHECKPOINT_BYTES
    models = sum(student.num_bytes for student in job.students)
    exports = {"gguf_f16": 0.5, "gguf_q8_0": 0.27}
    models += round(sum(exports[name] for name in job.block.export) * sizes.num_bytes)
    return (keep_checkpoints + 1) * checkpoint + models + cache_bytes(job, rows)


def cache_bytes(job: PlannedJob, rows: RowCounts) -> int:
    """Returns the size of the cache of the teacher's rows: one float32 vector for each target."""
    if not job.uses_rows_of_teacher:
        return 0
    num_targets = rows.train_targets + rows.valid_targets
    return num_targets * (4 * job.teacher.hidden_size + 8)
