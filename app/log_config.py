"""Logging configuration of all processes of the service: JSON lines on standard error."""

import logging

import structlog
from structlog.typing import Processor

# Libraries that log an event per request or per task.
NOISY = ("httpx", "urllib3", "alembic", "celery.worker.strategy", "celery.app.trace")


def configure_logging(level: str, *, replaces_handlers: bool = False) -> None:
    """Routes structlog events and the log records of libraries through one JSON handler.

    If the root logger already has handlers, the JSON handler is not installed. With
    `replaces_handlers` it replaces them, and the configuration is final: loggers are cached.
    """
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso"),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=replaces_handlers,
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=replaces_handlers)
    for noisy in NOISY:
        logging.getLogger(noisy).setLevel(logging.WARNING)
