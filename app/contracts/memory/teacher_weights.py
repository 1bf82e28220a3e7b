"""Size of the weights of a teacher, quantised or not."""

from app.contracts.distillation import Auto, TeacherPrecision
from app.contracts.planned_jobs import PlannedJob

INT4_GROUP = 32  # weights that share a scale and a zero point
# The inputs of a quantised layer must be a multiple of this number, for fp8 also its outputs.
QUANTIZED_MULTIPLES: dict[TeacherPrecision, int] = {"int8": 1, "int4": INT4_GROUP, "fp8": 16}
# Bytes per parameter of quantised matrices. Scales are left out, except those of groups.
QUANTIZED_BYTES: dict[TeacherPrecision, float] = {"int8": 1.0, "int4": 0.5, "fp8": 1.0}


def teacher_weight_bytes(
    num_quantizable: int, num_others: int, precision: TeacherPrecision | Auto, value_bytes: int
) -> int:
    """Returns the size of a teacher's weights.

    `num_quantizable` parameters are in its linear layers. The others are embeddings, norms and the
    LM head, which are never quantised and take `value_bytes` each.
    """
    each = value_bytes if precision == "auto" else QUANTIZED_BYTES[precision]
    if precision == "int4":
        each += 2 * value_bytes / INT4_GROUP
    return round(each * num_quantizable) + value_bytes * num_others


def job_teacher_bytes(job: PlannedJob, value_bytes: int) -> int:
    """Returns the size of the weights of a job's teacher. The few norms count as linear layers."""
    num_linear = job.teacher.layer_parameters
    num_others = job.teacher.num_parameters - num_linear
    return teacher_weight_bytes(num_linear, num_others, job.block.teacher_precision, value_bytes)
