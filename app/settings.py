"""Settings of the service, read from environment variables with the prefix STILLHOUSE_."""

from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

CUDA_DEVICES = r"^([\w/-]+(,[\w/-]+)*)?$"  # device numbers or UUIDs, separated by commas


class Settings(BaseSettings):
    """All settings, with their defaults. Call `get_settings()` for those of this process."""

    model_config = SettingsConfigDict(env_prefix="STILLHOUSE_", extra="ignore", frozen=True)

    data_dir: Path = Field(
        Path(".stillhouse"), description="Folder for everything that `stillhouse up` owns"
    )
    database_url: str = Field(
        "", description="PostgreSQL URL; empty: `stillhouse up` starts a server in the data folder"
    )
    redis_url: str = Field(
        "",
        description="Redis or Valkey URL; empty: `stillhouse up` starts a server in the data folder",
    )
    store_url: str = Field(
        "",
        description="Artifact store: a folder or s3://bucket/prefix; empty: `store` in the data folder",
    )
    key_pepper: str = Field(
        "", description="Secret for hashing API keys; empty: the file `pepper` in the data folder"
    )
    host: str = Field("127.0.0.1", description="Address the API listens on")
    port: int = Field(8400, ge=0, le=65535, description="Port the API listens on")
    allowed_origins: str = Field(
        "*",
        description="Allowed CORS origins, separated by commas or spaces; empty: none",
    )
    log_level: str = Field("info", description="Log level: debug, info, warning or error")
    log_requests: bool = Field(False, description="Whether the API logs one line per request")
    otlp_endpoint: str = Field(
        "",
        pattern=r"^(https?://\S+)?$",
        description="URL of an OpenTelemetry collector that takes traces by OTLP over HTTP; empty: no traces",
    )

    max_file_bytes: int = Field(512 * 2**20, gt=0, description="Maximum size of an uploaded file")
    max_import_bytes: int = Field(
        64 * 2**30, gt=0, description="Maximum size of a model that is uploaded, also when unpacked"
    )
    max_line_bytes: int = Field(
        2**20, gt=0, description="Maximum length of a line of an uploaded JSONL file"
    )
    max_rows_per_file: int = Field(
        2_000_000, gt=0, description="Maximum number of rows of a training file"
    )
    max_bytes_per_project: int = Field(
        100 * 2**30, gt=0, description="Maximum size of all files of a project"
    )
    max_files_per_project: int = Field(
        10_000, gt=0, description="Maximum number of files of a project"
    )
    max_active_jobs_per_project: int = Field(
        100,
        gt=0,
        description="Maximum number of jobs of a project that have not ended; batches have the same limit",
    )
    max_body_bytes: int = Field(4 * 2**20, gt=0, description="Maximum size of a JSON request body")
    min_free_bytes: int = Field(
        2**30, ge=0, description="Disk space that must stay free in addition to what a job needs"
    )

    heartbeat_seconds: float = Field(
        10.0, gt=0, description="Interval at which a train worker renews its lease"
    )
    lease_seconds: float = Field(
        90.0,
        gt=0,
        description="Time without a heartbeat after which another worker may take the job or batch",
    )
    reconcile_seconds: float = Field(5.0, gt=0, description="Interval of the reconciler")
    ring_again_seconds: float = Field(
        30.0,
        gt=0,
        description="Time after which the wake-up message for an unclaimed job is sent again",
    )
    retry_backoff_seconds: float = Field(
        5.0,
        ge=0,
        description="Delay before a job is tried again after a lost worker; doubles with each loss",
    )
    max_losses: int = Field(3, ge=1, description="Number of lost workers after which a job fails")
    max_runtime_seconds: float = Field(
        24 * 3600.0,
        gt=0,
        description="Maximum running time of a job before it is paused; resuming the job resets it",
    )
    keep_checkpoints: int = Field(
        2, ge=2, description="Number of newest checkpoints to keep in addition to the best one"
    )
    teacher_cache_bytes: int = Field(
        20 * 2**30, ge=0, description="Maximum size of the caches of teacher outputs and answers"
    )
    artifact_cache_bytes: int = Field(
        50 * 2**30,
        ge=0,
        description="Maximum size of a worker's local copies of artifacts in a remote store; copies in use may exceed it",
    )
    num_threads: int = Field(
        0, ge=0, description="Number of compute threads of a trainer or engine; 0: all cores"
    )
    training_cpu_share: float = Field(
        0.45,
        ge=0.05,
        le=1,
        description="Share of the CPU time that training gets while a serve worker on the same cores is busy; 1 disables time-sharing",
    )
    num_processes: int = Field(
        0,
        ge=0,
        description="Number of processes that train one student, and of CUDA devices that they use; 0: as `num_devices` of the job",
    )
    work_dir: str = Field(
        "", description="Parent of the work folders of runs; empty: `work` in the data folder"
    )

    train_cuda_devices: str = Field(
        "",
        pattern=CUDA_DEVICES,
        description="CUDA devices of the train workers, as in CUDA_VISIBLE_DEVICES; empty: all that are visible. A job uses as many as it asks for",
    )
    serve_cuda_devices: str = Field(
        "",
        pattern=CUDA_DEVICES,
        description="CUDA devices of the serve workers, each of which uses one of its devices; empty: all that are visible",
    )
    serve_device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Device of our engine; auto: a CUDA device if there is one"
    )
    serve_precision: Literal["auto", "float32"] = Field(
        "auto",
        description="dtype on a CPU of models whose weights option is auto; auto: bfloat16 if the CPU supports it",
    )
    serve_cuda_graphs: bool = Field(
        True, description="Whether our engine replays decode steps as CUDA graphs on a CUDA device"
    )
    max_running_sequences: int = Field(
        64,
        ge=1,
        le=1024,
        description="Maximum number of sequences that a serve worker decodes together",
    )
    max_waiting_requests: int = Field(
        256, ge=0, description="Maximum number of generation requests in progress, per API process"
    )
    max_waiting_tokens: int = Field(
        400_000,
        ge=1,
        description="Maximum number of tokens reserved by requests in progress, per API process",
    )
    max_answer_bytes: int = Field(
        16 * 2**20,
        ge=1,
        description="Maximum estimated size of a response, checked before generation starts. Of a streamed response only an echoed prompt counts",
    )
    max_requests_per_key: int = Field(
        64,
        ge=1,
        description="Maximum number of generation requests of one key in progress, per API process",
    )
    max_batch_sequences: int = Field(
        8,
        ge=1,
        le=256,
        description="Maximum number of sequences of batches in progress, per API process",
    )
    request_timeout_seconds: float = Field(
        600.0, gt=0, description="Maximum duration of a generation request"
    )
    model_load_wait_seconds: float = Field(
        30.0, ge=0, description="Maximum time that a request waits for a model that is being loaded"
    )
    resident_model_bytes: int = Field(
        0,
        ge=0,
        description="Maximum memory of the models of a serve worker with their KV caches; 0: 4 GiB on a CPU, and 85% of the free memory of a CUDA device",
    )
    max_context_tokens: int = Field(
        2048, ge=16, description="Maximum number of tokens of prompt and answer together"
    )
    store_projects: str = Field(
        "",
        description="Projects whose chat completions are stored unless the request has `store: false`, separated by commas; `*`: all",
    )
    max_stored_bytes: int = Field(
        2**20,
        gt=0,
        description="Maximum size of a stored chat completion with its request; larger ones are not stored",
    )
    stored_max_age_seconds: float = Field(
        30 * 86_400.0, gt=0, description="Age at which a stored chat completion is deleted"
    )
    stored_bytes_per_project: int = Field(
        10 * 2**30,
        gt=0,
        description="Maximum size of all stored chat completions of a project; the oldest are deleted above it",
    )
    serve_heartbeat_seconds: float = Field(
        1.0, gt=0, description="Interval of the heartbeats of a serve worker"
    )

    webhook_allowed_hosts: str = Field(
        "",
        description="Hosts of webhook receivers that may have private or loopback addresses and plain http, separated by commas or spaces",
    )

    hf_endpoint: str = Field("", description="Hub for `hf:` imports; empty: the Hugging Face hub")
    hf_token: str = Field(
        "",
        description="Token for the hub, for imports by keys with the scope `hub:token` or `admin`",
    )
    wandb_api_key: str = Field(
        "", description="API key for Weights & Biases; empty: jobs cannot send metrics there"
    )
    wandb_base_url: str = Field(
        "", description="URL of a Weights & Biases server; empty: the public service"
    )
    wandb_mode: Literal["online", "offline"] = Field(
        "online",
        description="offline: runs for Weights & Biases are written to `wandb` in the data folder",
    )
    mlflow_tracking_uri: str = Field(
        "",
        pattern=r"^(https?://.+)?$",
        description="URL of an MLflow server, with user and password if it needs them; empty: jobs cannot send metrics there",
    )
    tensorboard_dir: str = Field(
        "",
        description="Folder for TensorBoard event files; empty: `tensorboard` in the data folder",
    )
    crash_dir: str = Field(
        "", description="For fault tests only: folder in which crash points are armed; empty: none"
    )

    def store_root(self) -> str:
        """Returns the URL or the folder of the artifact store."""
        return self.store_url or str((self.data_dir / "store").resolve())

    def tensorboard_root(self) -> Path:
        """Returns the folder in which each job creates its folder of TensorBoard files."""
        folder = self.tensorboard_dir or self.data_dir / "tensorboard"
        return Path(folder).resolve()

    def work_root(self) -> Path:
        """Returns the folder below which each run creates its work folder."""
        return Path(self.work_dir) if self.work_dir else (self.data_dir / "work").resolve()


@lru_cache
def get_settings() -> Settings:
    """Returns the settings of this process, read from the environment at the first call."""
    return Settings()


def celery_settings(
    settings: Settings,
) -> dict[str, Any]:  # Any: Celery's own untyped configuration
    """Returns the Celery configuration that producers and workers share.

    Workers acknowledge a message on receipt. Jobs are stored in Postgres, so a lost or repeated
    message does no harm. A restart of the broker neither ends a run nor starts it twice.
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
