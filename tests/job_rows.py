"""Rows of distillation jobs for tests that work on the database, without an API or a run."""

from typing import Any

from app.contracts.distillation import Distillation
from app.contracts.messages import ArtifactRef, DistillationJob, ModelFacts
from app.db import jobs
from app.db.session import transaction
from worker.jobs import lease_client
from worker.jobs.lease_client import Lease

FACTS = ModelFacts(
    architecture="LlamaForCausalLM",
    num_layers=2,
    hidden_size=64,
    vocab_size=384,
    context_tokens=256,
    num_parameters=1000,
    tokenizer_sha256="0" * 64,
    has_chat_template=True,
    weights_bytes=4000,
    weights_sha256="0" * 64,
)


def ref(key: str) -> ArtifactRef:
    return ArtifactRef(key=key, bytes=10, sha256="a" * 64)


SPEC = DistillationJob(
    distillation=Distillation(teacher="big"),
    teacher=ref("models/big"),
    start=ref("models/big"),
    training_file=ref("files/f"),
    output_model="ds:small",
    seed=0,
)


def add_job(job_id: str = "ftjob-1", **columns: Any) -> None:  # Any: columns of Job
    values = {
        "project_id": "p",
        "kind": "distillation",
        "spec": SPEC.model_dump(mode="json"),
        "model_id": SPEC.output_model,
        "request": {"model": "big"},
    }
    with transaction() as session:
        jobs.insert_job(session, id=job_id, **{**values, **columns})


def claim(worker_id: str = "w") -> Lease:
    lease = lease_client.claim(worker_id)
    assert lease is not None
    return lease
