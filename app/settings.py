"""Every setting of the service, in one place: environment variables with the prefix STILLHOUSE_."""

from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

CUDA_DEVICES = r"^([\w/-]+(,[\w/-]+)*)?$"  # numbers or UUIDs, separated by commas


class Settings(BaseSettings):
    """Read once per process by `get_settings()`; the README lists each field with its meaning."""

    model_config = SettingsConfigDict(env_prefix="STILLHOUSE_", extra="ignore", frozen=True)

    data_dir: Path = Field(
        Path(".stillhouse"), description="Where `stillhouse up` keeps everything it owns"
    )
    database_url: str = Field(
        "", description="PostgreSQL URL; empty: `stillhouse up` starts one in the data dir"
    )
    redis_url: str = Field(
        "", description="Redis or Valkey URL; empty: `stillhouse up` starts one in the data dir"
    )
    store_url: str = Field(
        "", description="Artifact store: a folder or s3://bucket/prefix; empty: <data-dir>/store"
    )
    key_pepper: str = Field(
        "", description="Secret mixed into API key hashes; empty: kept in <data-dir>/pepper"
    )
    host: str = Field("127.0.0.1", description="Address the API listens on")
    port: int = Field(8400, ge=0, le=65535, description="Port the API listens on")
    allowed_origins: str = Field(
        "*",
        description="Origins, by blanks or commas, whose web pages may call the API, with a key; empty: none",
    )
    log_level: str = Field("info", description="debug, info, warning or error")

    max_file_bytes: int = Field(512 * 2**20, gt=0, description="Largest upload")
    max_line_bytes: int = Field(2**20, gt=0, description="Longest line of an uploaded JSONL file")
    max_rows_per_file: int = Field(2_000_000, gt=0, description="Rows of an uploaded training file")
    max_bytes_per_project: int = Field(
        100 * 2**30, gt=0, description="Bytes of files a project may keep"
    )
    max_files_per_project: int = Field(10_000, gt=0, description="Files a project may keep")
    max_active_jobs_per_project: int = Field(
        100, gt=0, description="Jobs, and batches, of a project that have not ended"
    )
    max_body_bytes: int = Field(4 * 2**20, gt=0, description="Largest JSON request body")
    min_free_bytes: int = Field(
        2**30, ge=0, description="Disk that must stay free beside what a job needs"
    )

    heartbeat_seconds: float = Field(
        10.0, gt=0, description="How often a train worker renews its lease"
    )
    lease_seconds: float = Field(
        90.0, gt=0, description="Silence after which another may take the job, or the batch"
    )
    reconcile_seconds: float = Field(5.0, gt=0, description="How often the reconciler looks")
    ring_again_seconds: float = Field(
        30.0, gt=0, description="An unclaimed job is rung again after this long"
    )
    retry_backoff_seconds: float = Field(
        5.0, ge=0, description="Wait after a lost worker; doubles with each loss"
    )
    max_losses: int = Field(3, ge=1, description="Lost workers after which a job fails")
    max_runtime_seconds: float = Field(
        24 * 3600.0,
        gt=0,
        description="Maximum running time of a job before it is paused; resuming the job resets it",
    )
    keep_checkpoints: int = Field(
        2, ge=2, description="Newest checkpoints kept beside the best one"
    )
    teacher_cache_bytes: int = Field(
        20 * 2**30, ge=0, description="Disk for teacher caches and answers"
    )
    artifact_cache_bytes: int = Field(
        50 * 2**30,
        ge=0,
        description="Disk for a worker's local copies of artifacts of a remote store; copies in use may exceed it",
    )
    num_threads: int = Field(
        0, ge=0, description="Compute threads of a trainer or engine; 0: all cores"
    )
    training_cpu_share: float = Field(
        0.45,
        ge=0.05,
        le=1,
        description="Share of the CPU time that training gets while a serve worker on the same cores is busy; 1 disables time-sharing",
    )
    num_processes: int = Field(
        0, ge=0, description="Processes that train one student; 0: one a CUDA device"
    )
    work_dir: str = Field(
        "", description="Where runs lay their work folders; empty: <data-dir>/work"
    )

    train_cuda_devices: str = Field(
        "",
        pattern=CUDA_DEVICES,
        description="CUDA devices of the train workers, as in CUDA_VISIBLE_DEVICES; empty: all that are visible",
    )
    serve_cuda_devices: str = Field(
        "",
        pattern=CUDA_DEVICES,
        description="The same for the serve workers, each of which uses its first device",
    )
    serve_device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="What our engine runs on; auto: a CUDA device if there is one"
    )
    serve_precision: Literal["auto", "float32"] = Field(
        "auto",
        description="Float of models whose weights option is auto, on a CPU; auto: bfloat16 if it multiplies that itself",
    )
    max_running_sequences: int = Field(
        64, ge=1, le=1024, description="Sequences decoded together by a serve worker"
    )
    max_waiting_requests: int = Field(
        256, ge=0, description="Generation requests admitted and not finished, per API"
    )
    max_waiting_tokens: int = Field(
        400_000, ge=1, description="Tokens reserved by admitted requests, per API"
    )
    max_answer_bytes: int = Field(
        16 * 2**20,
        ge=1,
        description="Maximum estimated size of a response that is not streamed, checked before generation starts",
    )
    max_requests_per_key: int = Field(
        64, ge=1, description="Generation requests of one key at once, per API"
    )
    max_batch_sequences: int = Field(
        8, ge=1, le=256, description="Sequences that batches have in the engine at once, per API"
    )
    request_timeout_seconds: float = Field(
        600.0, gt=0, description="A generation request ends after this long"
    )
    model_load_wait_seconds: float = Field(
        30.0, ge=0, description="How long a request waits for a loading model"
    )
    resident_model_bytes: int = Field(
        4 * 2**30, gt=0, description="Weights a serve worker keeps loaded"
    )
    max_context_tokens: int = Field(
        2048, ge=16, description="Longest prompt plus answer the engine keeps room for"
    )
    serve_heartbeat_seconds: float = Field(
        1.0, gt=0, description="How often a serve worker says it lives"
    )

    hf_endpoint: str = Field(
        "", description="Hub that `hf:` imports are fetched from; empty: the Hugging Face hub"
    )
    hf_token: str = Field(
        "",
        description="Token for the hub, for imports by keys with the scope `hub:token` or `admin`",
    )
    crash_dir: str = Field(
        "", description="For fault tests only: where crash points are armed; empty: nowhere"
    )

    def store_root(self) -> str:
        return self.store_url or str((self.data_dir / "store").resolve())

    def work_root(self) -> Path:
        return Path(self.work_dir) if self.work_dir else (self.data_dir / "work").resolve()


@lru_cache
def get_settings() -> Settings:
    return Settings()


def celery_settings(
    settings: Settings,
) -> dict[str, Any]:  # Any: Celery's own untyped configuration
    """Celery configuration shared by the producer and the workers.

    Messages are doorbells and hand-overs, acknowledged at once: Postgres is the truth about jobs, so
    neither a redelivery nor a loss may matter, and a broker restart can neither kill nor double a run.
    """
    visibility_seconds = 300
    return {
        "broker_url": settings.redis_url,
        "result_backend": None,
        "task_ignore_result": True,
        "task_serializer": "json",
        "result_serializer": "json",
        "accept_content": ["json"],
        "task_acks_late": False,
        "task_reject_on_worker_lost": False,
        "task_publish_retry": False,
        "broker_connection_timeout": 4,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "broker_pool_limit": 10,
        "broker_pool_acquire_timeout": 5,
        "visibility_timeout": visibility_seconds,
        "broker_transport_options": {
            "visibility_timeout": visibility_seconds,
            "socket_timeout": 10,
            "socket_connect_timeout": 3,
            "socket_keepalive": True,
            "health_check_interval": 10,
            "retry_on_timeout": False,
            "global_keyprefix": "stillhouse:",
        },
        "worker_prefetch_multiplier": 1,
        "worker_disable_prefetch": True,
        "worker_enable_remote_control": False,
        "worker_send_task_events": False,
        "worker_hijack_root_logger": False,
        "worker_cancel_long_running_tasks_on_connection_loss": False,
    }
