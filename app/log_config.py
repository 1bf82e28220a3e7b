"""Logging configuration of the control plane: JSON lines on standard error."""

import logging

import structlog
from structlog.typing import Processor


def configure_logging(level: str) -> None:
    """Routes structlog events and the log records of libraries through one JSON handler.

    Existing handlers of the root logger are kept; the JSON handler is then not installed.
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
    logging.basicConfig(level=level.upper(), handlers=[handler])
    for noisy in ("httpx", "urllib3", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
