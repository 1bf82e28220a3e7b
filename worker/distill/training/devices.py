"""Chooses the device and dtype of the student, and the teacher's placement by estimates of memory.

On a GPU with bfloat16, the student's weights and optimizer moments are float32. Its layers run
forward and backward under bfloat16 autocast, and the teacher's layers are bfloat16.

On a CPU with native bfloat16, the linear layers of both models multiply in bfloat16
(worker.cpu.linear_ops). On other hardware everything is float32. The loss is float32 on every
device.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from transformers import PretrainedConfig

from app.contracts.batch_plan import CPU_BATCH_TOKENS
from app.contracts.distillation import Auto, Precision, TeacherPrecision
from app.contracts.job_memory import DeviceStudent, layer_bytes
from app.contracts.memory.step_parts import NO_PARTS, StepParts, feature_bytes, rollout_bytes
from app.contracts.memory.teacher_weights import teacher_weight_bytes
from app.contracts.model_sizes import ModelSizes, measure_model, num_trained
from worker.cpu import HAS_FAST_BFLOAT16, TRAINS_IN_BFLOAT16
from worker.distill.students.layer_dropping import cut_config
from worker.distill.students.recipe import StudentRecipe
from worker.distill.students.width_pruning import narrow_config, sizes_of
from worker.distill.teachers.quantized import num_quantizable
from worker.models.architectures import bare_model

PLANNED_SHARE = 0.9  # of the free memory; the rest is left for fragmentation
GIB = 2**30
MICRO_TOKENS = (8_192, 4_096, 2_048, 1_024, 512, 256)  # choices of `place_largest` below the most


@dataclass(frozen=True)
class Device:
    """The device of a process: "cpu", or "cuda", which is the GPU of this process.

    `decodes_in_bfloat16`: on a CPU, models that generate text have bfloat16 weights, as served models
    have there. Decoding is limited by reading the weights, so it gains where training does not.
    """

    name: str = "cpu"
    card: str = ""
    free_bytes: int = 0
    has_bfloat16: bool = False
    decodes_in_bfloat16: bool = False

    @property
    def autocast(self) -> torch.dtype | None:
        """The autocast dtype of the student's layers, or None to run in float32."""
        return torch.bfloat16 if self.name == "cuda" and self.has_bfloat16 else None

    @property
    def matmul_dtype(self) -> torch.dtype:
        """The dtype in which linear layers multiply on a CPU."""
        return torch.bfloat16 if self.name == "cpu" and self.has_bfloat16 else torch.float32

    @property
    def decoding_dtype(self) -> torch.dtype:
        """The dtype in which linear layers multiply on a CPU while a model generates text."""
        return torch.bfloat16 if self.decodes_in_bfloat16 else self.matmul_dtype

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
    `student_work_bytes`: the part of `student_bytes` that is free while the teacher runs.
    `num_quantizable`: number of the teacher's weights that `precision` applies to.
    """

    student_bytes: int
    num_teacher_parameters: int
    teacher_work_bytes: int
    can_cache: bool
    saved_bytes: int = 0
    student_work_bytes: int = 0
    num_quantizable: int = 0
    precision: TeacherPrecision | Auto = "auto"

    def weight_bytes(self, dtype: torch.dtype) -> int:
        """Returns the memory of the teacher's weights. Those not quantised are in `dtype`."""
        num_others = self.num_teacher_parameters - self.num_quantizable
        return teacher_weight_bytes(
            self.num_quantizable, num_others, self.precision, dtype.itemsize
        )

    def teacher_bytes(self, dtype: torch.dtype) -> int:
        return self.weight_bytes(dtype) + self.teacher_work_bytes

    def both_bytes(self, dtype: torch.dtype, *, has_checkpointing: bool = False) -> int:
        """Returns the memory of the teacher beside the student. They take turns in a step."""
        saved_bytes = self.saved_bytes if has_checkpointing else 0
        work_bytes = max(0, self.student_work_bytes - saved_bytes)
        weights = self.weight_bytes(dtype)
        more = max(0, self.teacher_work_bytes - work_bytes)
        return self.student_bytes - saved_bytes + weights + more


@dataclass(frozen=True)
class Placement:
    """Devices and dtypes of a run's models.

    `is_teacher_first`: the teacher fills the row cache alone, and is freed before the student is
    loaded. `is_tight`: the models may not fit into GPU memory. `has_checkpointing`: the student
    keeps few activations and recomputes the others in the backward pass. `micro_tokens`: the most
    tokens of a micro-batch. None: batches are not divided. `has_room_for_start`: a second model of
    the teacher's size, which is not quantised, fits beside the student.
    """

    device: Device = CPU
    teacher_device: str = "cpu"
    teacher_dtype: torch.dtype = torch.float32
    is_teacher_first: bool = False
    is_tight: bool = False
    has_checkpointing: bool = False
    micro_tokens: int | None = None
    teacher_precision: TeacherPrecision | Auto = "auto"
    has_room_for_start: bool = True

    @property
    def rank(self) -> tuple[bool, bool, bool, bool]:
        """Order of preference among placements: the fastest is the smallest."""
        is_on_cpu = self.teacher_device == "cpu"
        return self.is_tight, is_on_cpu, self.has_checkpointing, self.is_teacher_first

    @property
    def beside_student(self) -> tuple[str, torch.dtype]:
        """Device and dtype of a second model of the teacher's size, loaded beside the student."""
        if self.is_teacher_first or not self.has_room_for_start:
            return "cpu", torch.float32
        return self.teacher_device, self.teacher_dtype

    @property
    def message(self) -> str:
        """The message for the job's events, empty if there was nothing to choose."""
        quantised = "" if self.teacher_precision == "auto" else self.teacher_precision
        if self.device.name == "cpu":
            if quantised:
                return f"device: CPU; student with {self.device.precision} matmuls; teacher in {quantised}"
            if self.device.has_bfloat16:
                return "device: CPU; student and teacher use bfloat16 matmuls"
            is_rounded = self.device.decodes_in_bfloat16
            return "device: CPU; answers are generated with bfloat16 weights" if is_rounded else ""
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
        dtype = quantised or str(self.teacher_dtype).removeprefix("torch.")
        tight = f"; {too_large} too large for the GPU, by estimate" if self.is_tight else ""
        free = f"{self.device.free_bytes / GIB:.1f} GiB free"
        if self.has_checkpointing:
            floats += " with activation checkpointing"
        batch = (
            f"; micro-batches of at most {self.micro_tokens:,} tokens" if self.micro_tokens else ""
        )
        return f"device: {self.device.card} ({free}); student in {floats}; teacher in {dtype}, {where}{batch}{tight}"


ON_CPU = Placement()


def find_device(
    number: int = 0, precision: Precision | Auto = "auto", resumed: Precision | None = None
) -> Device:
    """Selects GPU number `number` for this process, or the CPU if there is no GPU.

    bfloat16 is used if the hardware has it, unless `precision` is "float32". On a CPU that has it
    but multiplies it no faster, it is only used to generate text, unless `precision` is "bfloat16".
    With "auto", a run is trained in the precision of the checkpoint that it continues, `resumed`.
    """
    trained = resumed if resumed is not None and precision == "auto" else precision
    if not torch.cuda.is_available():
        has_bfloat16 = HAS_FAST_BFLOAT16 if trained == "bfloat16" else TRAINS_IN_BFLOAT16
        return Device(
            has_bfloat16=has_bfloat16 and trained != "float32",
            decodes_in_bfloat16=HAS_FAST_BFLOAT16 and precision != "float32",
        )
    torch.cuda.set_device(number % torch.cuda.device_count())
    free_bytes, _ = torch.cuda.mem_get_info()
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False) and trained != "float32"
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
    placed = _first_that_fits(device, needs)
    if placed.teacher_device == "cpu":
        return on_cpu(placed, needs.precision)
    full_bytes = replace(needs, precision="auto").both_bytes(placed.teacher_dtype)
    return replace(
        placed,
        teacher_precision=needs.precision,
        has_room_for_start=needs.precision == "auto" or full_bytes <= device.planned_bytes,
    )


def on_cpu(placed: Placement, precision: TeacherPrecision | Auto) -> Placement:
    """Returns the placement with a teacher of this precision on the CPU.

    PyTorch's fast matmul for int4 needs bfloat16. A start model beside such a teacher is float32.
    """
    if precision == "auto":
        return placed
    dtype = torch.bfloat16 if precision == "int4" else torch.float32
    return replace(
        placed, teacher_dtype=dtype, teacher_precision=precision, has_room_for_start=False
    )


def _first_that_fits(device: Device, needs: Needs) -> Placement:
    """Returns the placement without the teacher's precision. See `place`."""
    if device.name == "cpu":
        return Placement(device)
    least_bytes = needs.student_bytes - needs.saved_bytes
    is_tight = least_bytes > device.planned_bytes
    has_checkpointing = needs.saved_bytes > 0 and needs.student_bytes > device.planned_bytes
    for dtype in teacher_dtypes(device, needs.precision):
        teacher_bytes = needs.teacher_bytes(dtype)
        if needs.both_bytes(dtype) <= device.planned_bytes:
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
        if needs.both_bytes(dtype, has_checkpointing=True) <= device.planned_bytes:
            return Placement(device, "cuda", dtype, has_checkpointing=True)
    return Placement(device, is_tight=is_tight, has_checkpointing=has_checkpointing)


def teacher_dtypes(device: Device, precision: TeacherPrecision | Auto) -> tuple[torch.dtype, ...]:
    """Returns the dtypes of a teacher on a GPU, the best first.

    The kernels for int4 and fp8 compute in bfloat16, also if the job requests float32.
    """
    if device.has_bfloat16 or precision in ("int4", "fp8"):
        return (torch.bfloat16,)
    return torch.float32, torch.float16


def place_alone(device: Device, needs: Needs) -> Placement:
    """Returns the placement of a student without a teacher."""
    is_large = needs.student_bytes > device.planned_bytes
    is_tight = needs.student_bytes - needs.saved_bytes > device.planned_bytes
    return Placement(device, "cuda", torch.float32, has_checkpointing=is_large, is_tight=is_tight)


def place_largest(placed_with: Callable[[int], Placement], most_tokens: int) -> Placement:
    """Returns the placement with the largest micro-batch among those that are the fastest.

    `placed_with` returns the placement for micro-batches of a number of tokens. Numbers below
    `CPU_BATCH_TOKENS` are used only if the models do not fit on the GPU otherwise, or if
    `most_tokens` is lower.
    """
    choices = [most_tokens, *(tokens for tokens in MICRO_TOKENS if tokens < most_tokens)]
    placed = [replace(placed_with(tokens), micro_tokens=tokens) for tokens in choices]
    num_full = max(1, sum(tokens >= CPU_BATCH_TOKENS for tokens in choices))
    best = min(placed[:num_full], key=lambda each: each.rank)  # the first of equals is the largest
    if best.is_tight or best.teacher_device == "cpu":
        best = min(placed, key=lambda each: each.rank)
    return placed[-1] if best.is_tight else best


def needs_by_tokens(
    device: Device,
    recipe: StudentRecipe,
    start: PretrainedConfig,
    teacher: PretrainedConfig,
    *,
    can_cache: bool = True,
    row_tokens: int = 512,
    source_share: float | None = None,
    parts: StepParts = NO_PARTS,
    teacher_precision: TeacherPrecision | Auto = "auto",
) -> Callable[[int, bool], Needs]:
    """Returns a function of the most tokens of a micro-batch, and of whether gradients accumulate.

    It estimates memory from configurations, without weights. `start` is the student's start model.
    The student's part is that of `DeviceStudent`, whose fields explain the other arguments. The
    teacher's part is its weights and the activations of one layer.
    """
    has_autocast = device.autocast is not None
    sizes, big = sizes_of_config(planned_config(recipe, start)), sizes_of_config(teacher)
    trains_head = not recipe.freeze_head and recipe.lora is None
    frozen = {"freeze_head": not trains_head, "freeze_encoder": recipe.freeze_encoder}
    value_bytes = 2 if device.has_bfloat16 else 4
    one_batch = DeviceStudent(
        sizes=sizes,
        num_trained=num_trained(recipe.student.model_copy(update=frozen), sizes),
        trains_head=trains_head,
        num_teacher_head=big.head_parameters,
        row_tokens=row_tokens,
        source_share=source_share,
        has_frozen_encoder=recipe.freeze_encoder,
        trains_norms=recipe.lora is None,
        num_lowered=sizes.layer_parameters if recipe.lora is not None and has_autocast else 0,
        features=feature_bytes(parts, sizes, big, row_tokens=row_tokens, value_bytes=value_bytes),
        rollout_bytes=rollout_bytes(sizes, parts.rollouts),
    )
    needs = _teacher_needs(teacher, teacher_precision, can_cache=can_cache)
    teacher_layer = max(
        layer_bytes(big, kind, has_autocast=has_autocast, row_tokens=row_tokens)
        for kind in big.kinds
    )

    def needs_of(batch_tokens: int, accumulates: bool) -> Needs:
        """Returns the needs for micro-batches of this many tokens."""
        student = replace(one_batch, accumulates=accumulates)
        student_bytes = student.peak_bytes(batch_tokens, has_autocast=has_autocast)
        return replace(
            needs,
            student_bytes=student_bytes,
            teacher_work_bytes=batch_tokens * teacher_layer,
            saved_bytes=student.saved_bytes(batch_tokens, has_autocast=has_autocast),
            student_work_bytes=student_bytes - student.resident_bytes,
        )

    return needs_of


def _teacher_needs(
    teacher: PretrainedConfig, precision: TeacherPrecision | Auto, *, can_cache: bool
) -> Needs:
    """Returns the needs of the teacher's weights alone."""
    model = bare_model(teacher)
    return Needs(
        student_bytes=0,
        num_teacher_parameters=sum(p.numel() for p in model.parameters()),
        teacher_work_bytes=0,
        can_cache=can_cache,
        num_quantizable=num_quantizable(model),
        precision=precision,
    )


def sizes_of_config(config: PretrainedConfig) -> ModelSizes:
    """Returns the sizes of a model from its configuration."""
    shapes = {name: tuple(p.shape) for name, p in bare_model(config).named_parameters()}
    return measure_model(shapes, config.to_dict())


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
