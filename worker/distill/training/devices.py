"""Chooses the device and dtype of the student, and the teacher's placement by estimates of memory.

On a GPU with bfloat16, the student's weights and optimizer moments are float32. Its layers run
forward and backward under bfloat16 autocast, and the teacher's layers are bfloat16.

On a CPU with native bfloat16, the linear layers of both models multiply in bfloat16
(worker.cpu.linear_ops). On other hardware everything is float32. The loss is float32 on every
device.
"""

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from app.contracts.distillation import Auto, Precision
from app.contracts.job_memory import DeviceStudent, device_student_bytes
from app.contracts.job_memory import layer_values as values_per_token
from worker.cpu import HAS_FAST_BFLOAT16
from worker.distill.students.layer_dropping import cut_config
from worker.distill.students.lora import add_lora
from worker.distill.students.recipe import StudentRecipe, freeze_encoder, freeze_head
from worker.distill.students.width_pruning import narrow_config, sizes_of
from worker.models.architectures import bare_model, layer_counts

PLANNED_SHARE = 0.9  # of the free memory; the rest is left for fragmentation
GIB = 2**30


@dataclass(frozen=True)
class Device:
    """The device of a process: "cpu", or "cuda", which is the GPU of this process."""

    name: str = "cpu"
    card: str = ""
    free_bytes: int = 0
    has_bfloat16: bool = False

    @property
    def autocast(self) -> torch.dtype | None:
        """The autocast dtype of the student's layers, or None to run in float32."""
        return torch.bfloat16 if self.name == "cuda" and self.has_bfloat16 else None

    @property
    def matmul_dtype(self) -> torch.dtype:
        """The dtype in which linear layers multiply on a CPU."""
        return torch.bfloat16 if self.name == "cpu" and self.has_bfloat16 else torch.float32

    @property
    def precision(self) -> Precision:
        return "bfloat16" if self.has_bfloat16 else "float32"

    @property
    def planned_bytes(self) -> int:
        return int(PLANNED_SHARE * self.free_bytes)


CPU = Device()


@dataclass(frozen=True)
class Needs:
    """Estimated GPU memory of a run's models, in bytes.

    `can_cache`: all teacher rows can be computed before the training and kept on disk.
    `saved_bytes`: what activation checkpointing takes off `student_bytes`.
    """

    student_bytes: int
    num_teacher_parameters: int
    teacher_work_bytes: int
    can_cache: bool
    saved_bytes: int = 0

    def teacher_bytes(self, dtype: torch.dtype) -> int:
        return self.num_teacher_parameters * dtype.itemsize + self.teacher_work_bytes


@dataclass(frozen=True)
class Placement:
    """Devices and dtypes of a run's models.

    `is_teacher_first`: the teacher fills the row cache alone, and is freed before the student is
    loaded. `is_tight`: the models may not fit into GPU memory. `has_checkpointing`: the student
    keeps few activations and recomputes the others in the backward pass.
    """

    device: Device = CPU
    teacher_device: str = "cpu"
    teacher_dtype: torch.dtype = torch.float32
    is_teacher_first: bool = False
    is_tight: bool = False
    has_checkpointing: bool = False

    @property
    def beside_student(self) -> tuple[str, torch.dtype]:
        """Device and dtype of a second model of the teacher's size, loaded beside the student."""
        if self.is_teacher_first:
            return "cpu", torch.float32
        return self.teacher_device, self.teacher_dtype

    @property
    def message(self) -> str:
        """The message for the job's events, empty if there was nothing to choose."""
        if self.device.name == "cpu":
            is_rounded = self.device.has_bfloat16
            return "device: CPU; student and teacher use bfloat16 matmuls" if is_rounded else ""
        floats = (
            "float32" if self.device.autocast is None else "float32 weights under bfloat16 autocast"
        )
        where, too_large = "beside the student", "both models together are"
        if self.is_teacher_first:
            where = "alone before the training, which reads its hidden states from the cache"
            too_large = "the student alone is"
        elif self.teacher_device == "cpu":
            where = "on the CPU, because it does not fit on the GPU"
            too_large = "the student alone is"
        dtype = str(self.teacher_dtype).removeprefix("torch.")
        tight = f"; {too_large} too large for the GPU, by estimate" if self.is_tight else ""
        free = f"{self.device.free_bytes / GIB:.1f} GiB free"
        if self.has_checkpointing:
            floats += " with activation checkpointing"
        return f"device: {self.device.card} ({free}); student in {floats}; teacher in {dtype}, {where}{tight}"


ON_CPU = Placement()


def find_device(number: int = 0, precision: Precision | Auto = "auto") -> Device:
    """Selects GPU number `number` for this process, or the CPU if there is no GPU.

    bfloat16 is used if the hardware has it, unless `precision` is "float32".
    """
    if not torch.cuda.is_available():
        return Device(has_bfloat16=HAS_FAST_BFLOAT16 and precision != "float32")
    torch.cuda.set_device(number % torch.cuda.device_count())
    free_bytes, _ = torch.cuda.mem_get_info()
    has_bfloat16 = (
        torch.cuda.is_bf16_supported(including_emulation=False) and precision != "float32"
    )
    # TF32 is precise enough for the loss: its inputs come from bfloat16 layers, which round more
    if has_bfloat16:
        torch.set_float32_matmul_precision("high")
    return Device("cuda", torch.cuda.get_device_name(), free_bytes, has_bfloat16)


def place(device: Device, needs: Needs) -> Placement:
    """Returns the first placement that fits.

    The order is:
    - the teacher beside the student;
    - the teacher alone before the training, to fill the row cache;
    - the teacher beside a student with activation checkpointing, which takes about a third longer;
    - all of these again in float16, on a GPU without bfloat16;
    - the teacher on the CPU.

    A student that does not fit alone gets activation checkpointing everywhere.
    """
    if device.name == "cpu":
        return Placement(device)
    least_bytes = needs.student_bytes - needs.saved_bytes
    is_tight = least_bytes > device.planned_bytes
    has_checkpointing = needs.saved_bytes > 0 and needs.student_bytes > device.planned_bytes
    dtypes = (torch.bfloat16,) if device.has_bfloat16 else (torch.float32, torch.float16)
    for dtype in dtypes:
        teacher_bytes = needs.teacher_bytes(dtype)
        if needs.student_bytes + teacher_bytes <= device.planned_bytes:
            return Placement(device, "cuda", dtype)
        if needs.can_cache and teacher_bytes <= device.planned_bytes:
            return Placement(
                device,
                "cuda",
                dtype,
                is_teacher_first=True,
                is_tight=is_tight,
                has_checkpointing=has_checkpointing,
            )
        if least_bytes + teacher_bytes <= device.planned_bytes:
            return Placement(device, "cuda", dtype, has_checkpointing=True)
    return Placement(device, is_tight=is_tight, has_checkpointing=has_checkpointing)


def find_needs(
    device: Device,
    recipe: StudentRecipe,
    start: PretrainedConfig,
    teacher: PretrainedConfig,
    *,
    batch_tokens: int,
    can_cache: bool,
) -> Needs:
    """Estimates memory from configurations, without weights. `start` is the student's start model.

    The student's part is that of `device_student_bytes`. The teacher's are its weights, the
    activations of one layer, and its LM head in float32 for the loss.
    """
    value_bytes = 4 if device.autocast is None else device.autocast.itemsize
    student = bare_model(planned_config(recipe, start))
    if recipe.freeze_head:
        freeze_head(student)
    if recipe.freeze_encoder:
        freeze_encoder(student)
    num_lowered = 0
    if recipe.lora is not None:
        add_lora(student, recipe.lora, seed=0, base_dtype=device.autocast or torch.float32)
        num_lowered = sum(p.numel() for p in student.parameters() if p.dtype != torch.float32)
    parameters = list(student.parameters())
    head = student.get_output_embeddings().weight
    big = bare_model(teacher)
    needed = DeviceStudent(
        num_parameters=sum(p.numel() for p in parameters),
        num_trained=sum(p.numel() for p in parameters if p.requires_grad),
        num_trained_head=head.numel() if head.requires_grad else 0,
        num_layers=sum(layer_counts(student.config)),
        num_stacks=sum(num_layers > 0 for num_layers in layer_counts(student.config)),
        hidden_size=hidden_size(student.config),
        layer_values=layer_values(student.config),
        num_teacher_head=big.get_output_embeddings().weight.numel(),
        num_lowered=num_lowered,
    )
    has_autocast = device.autocast is not None
    return Needs(
        student_bytes=device_student_bytes(
            needed, batch_tokens=batch_tokens, has_autocast=has_autocast
        ),
        num_teacher_parameters=sum(p.numel() for p in big.parameters()),
        teacher_work_bytes=batch_tokens * layer_values(teacher) * value_bytes,
        can_cache=can_cache,
        saved_bytes=needed.saved_bytes(batch_tokens, has_autocast=has_autocast),
    )


def hidden_size(config: PretrainedConfig) -> int:
    """Returns the hidden width. For an encoder-decoder it is that of the wider half."""
    if config.model_type == "encoder-decoder":
        return max(hidden_size(config.encoder), hidden_size(config.decoder))
    return int(config.hidden_size)


def layer_values(config: PretrainedConfig) -> int:
    """Returns the number of activations per token that a layer keeps for the backward.

    For an encoder-decoder it is that of the wider half.
    """
    if config.model_type == "encoder-decoder":
        return max(layer_values(config.encoder), layer_values(config.decoder))
    hidden = hidden_size(config)
    names = ("intermediate_size", "d_ff", "ffn_dim", "decoder_ffn_dim", "n_inner")
    wide = next((int(n) for name in names if (n := getattr(config, name, None))), 4 * hidden)
    return values_per_token(hidden, wide)


def planned_config(recipe: StudentRecipe, start: PretrainedConfig) -> PretrainedConfig:
    """Returns the configuration of the student that the recipe builds from `start`."""
    config = start
    if recipe.layers is not None:
        config = cut_config(config, recipe.layers, recipe.encoder_layers)
    return (
        narrow_config(config, sizes_of(recipe.student, config))
        if recipe.student.init == "width"
        else config
    )
