"""Names of metrics in the OpenAI API."""

from typing import Any

Json = dict[str, Any]  # Any: metrics are open-ended JSON
# OpenAI's names of metrics, and ours in the order of preference. Agreement is with the teacher,
# while OpenAI's accuracy is with the text of the rows.
OPENAI_METRICS = {
    "train_loss": ("train_loss",),
    "train_mean_token_accuracy": ("train_mean_token_accuracy", "train_agreement"),
    "valid_loss": ("valid_loss",),
    "valid_mean_token_accuracy": ("valid_mean_token_accuracy", "valid_agreement"),
    "full_valid_loss": ("valid_loss",),
    "full_valid_mean_token_accuracy": ("valid_mean_token_accuracy", "valid_agreement"),
}


def openai_metrics(ours: Json) -> Json:
    """Returns the metrics, also under the names that OpenAI uses.

    Every evaluation covers all held-out rows, so `valid` and `full_valid` have the same values.
    """
    renamed = {
        theirs: next((ours[name] for name in names if name in ours), None)
        for theirs, names in OPENAI_METRICS.items()
    }
    return {**{name: value for name, value in renamed.items() if value is not None}, **ours}
