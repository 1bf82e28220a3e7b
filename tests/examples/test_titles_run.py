"""The titles example posts a job that the API takes."""

from app.schemas.jobs import CreateJob
from examples.titles.run import STUDENT, TEACHER, job_body


def test_the_job_is_one_that_the_api_takes() -> None:
    job = CreateJob.model_validate(job_body("file-a", "file-b", n_epochs=3, seed=1))
    block = job.distillation
    assert block is not None
    assert (job.model, block.teacher) == (TEACHER, TEACHER)
    assert block.student.model_dump(exclude_unset=True) == STUDENT
    assert block.data.completions == "teacher"
    assert "exact_match" in block.evaluation.metrics
