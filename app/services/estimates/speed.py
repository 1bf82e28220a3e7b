"""Time of a job on the machines of this installation: the reference time, scaled by measurements.

The best measurement is that of finished jobs: their results have the time of each phase beside the
reference time. Without such jobs, the speed of a matmul on a worker is compared with that of the
reference machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from app.contracts.job_seconds import (
    FLOAT32_FACTOR,
    PHASES,
    REFERENCE_FLOPS,
    VERSION,
    Phase,
    reference_seconds,
)
from app.contracts.planned_jobs import PlannedJob, RowCounts
from app.contracts.train_workers import MachineProfile
from app.db.estimates.job_costs import JobCost

NUM_JOBS = 5  # newest jobs whose phases are used
LEAST_SECONDS = 0.3  # a phase that is expected to be shorter says nothing about the speed
FACTORS = (0.05, 50.0)  # plausible range


@dataclass(frozen=True)
class Speed:
    """Factors between times on this installation and on the reference machine, by phase.

    `note` says what they rest on. `has_bfloat16` is true if a worker or a finished job has used it.
    """

    factors: dict[Phase, float]
    has_bfloat16: bool
    note: str

    def seconds(
        self, job: PlannedJob, rows: RowCounts, *, num_kept: int = 0, num_processes: int = 1
    ) -> dict[Phase, float]:
        """Returns the seconds of each phase of a job whose batches are shared by processes.

        `num_kept` is the number of rows whose states are kept while the teacher answers.
        """
        is_exact = job.block.hyperparameters.precision == "float32"
        has_bfloat16 = self.has_bfloat16 and not is_exact
        expected = reference_seconds(
            job,
            rows,
            has_bfloat16=has_bfloat16,
            num_kept=num_kept,
            num_processes=num_processes,
        )
        return {phase: expected[phase] * self.factors[phase] for phase in PHASES}


def speed_of(
    costs: Sequence[JobCost],
    profiles: Sequence[MachineProfile],
    *,
    kind: str,
    device: str | None = None,
) -> Speed | None:
    """Returns the measured speed, or None if nothing was measured.

    `costs` are those of finished jobs, the newest first, and `kind` is the method and the start of
    the student. Jobs of this kind count if there are any, else jobs of other kinds. With `device`,
    only jobs on such a device count.
    """
    known = [
        cost
        for cost in costs
        if cost.version == VERSION and cost.seconds and device in (None, cost.device)
    ]
    # A job with float32 precision says nothing about the machine, so one measurement is enough.
    has_bfloat16 = any(cost.has_bfloat16 for cost in known)
    has_bfloat16 = has_bfloat16 or any(profile.has_bfloat16 for profile in profiles)
    used = ([cost for cost in known if cost.kind == kind] or known)[:NUM_JOBS]
    if used:
        what = "finished job" if len(used) == 1 else "finished jobs"
        others = "" if used[0].kind == kind else " of other kinds"
        return Speed(
            factors=_factors(used),
            has_bfloat16=has_bfloat16,
            note=f"The time is scaled by the measured phases of {len(used)} {what}{others}.",
        )
    if not profiles:
        return None
    slowest = min(profiles, key=lambda profile: profile.flops)
    # the reference time without bfloat16 is that of float32 matmuls, as is the measured speed
    expected_flops = REFERENCE_FLOPS * (1.0 if has_bfloat16 else FLOAT32_FACTOR)
    factor = _bounded(expected_flops / slowest.flops)
    return Speed(
        factors=dict.fromkeys(PHASES, factor),
        has_bfloat16=has_bfloat16,
        note="No job has finished yet, so the time is scaled by the speed of a matmul on a worker. "
        "It can be wrong by more than a factor of 1.5.",
    )


def _factors(costs: Sequence[JobCost]) -> dict[Phase, float]:
    """Returns the median factor of each phase; of a phase that no job had, that of all phases."""
    whole = median(
        sum(cost.seconds.values()) / max(1e-6, sum(cost.reference_seconds.values()))
        for cost in costs
    )
    factors: dict[Phase, float] = {}
    for phase in PHASES:
        found = [
            cost.seconds.get(phase, 0.0) / cost.reference_seconds[phase]
            for cost in costs
            if cost.reference_seconds.get(phase, 0.0) > LEAST_SECONDS
        ]
        factors[phase] = _bounded(median(found) if found else whole)
    return factors


def _bounded(factor: float) -> float:
    least, most = FACTORS
    return min(most, max(least, factor))
