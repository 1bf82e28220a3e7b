"""Checks at submission that the trackers of a job are configured."""

from collections.abc import Sequence
from importlib.util import find_spec

from app.contracts.trackers import Integration, TrackerName
from app.errors import BadRequest
from app.settings import Settings

PACKAGES: dict[TrackerName, str] = {"wandb": "wandb", "tensorboard": "tensorboard"}


def refuse_unconfigured(integrations: Sequence[Integration], settings: Settings) -> None:
    """Raises BadRequest if a tracker is not configured, or if a job names a tracker twice."""
    names = [integration.type for integration in integrations]
    for name in names:
        if names.count(name) > 1:
            raise BadRequest(
                f"the integration {name} is there twice; use each integration once",
                param="integrations",
            )
        needed = _missing(name, settings)
        if needed is not None:
            raise BadRequest(
                f"the integration {name} is not configured: {needed} on the server of the API, or "
                "leave the integration out",
                "integration_not_configured",
                "integrations",
            )


def _missing(name: TrackerName, settings: Settings) -> str | None:
    """Returns what the operator must do before the tracker can be used, or None."""
    if name == "wandb" and not settings.wandb_api_key:
        return "set STILLHOUSE_WANDB_API_KEY"
    if name == "mlflow" and not settings.mlflow_tracking_uri:
        return "set STILLHOUSE_MLFLOW_TRACKING_URI"
    package = PACKAGES.get(name)
    if package is not None and find_spec(package) is None:
        return "install stillhouse[trackers]"
    return None
