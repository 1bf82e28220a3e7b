"""Values that a job left to the service, with the reasons for them."""

from typing import Any

from pydantic import BaseModel, ConfigDict

from worker.protocol.run_lines import MessageLine


class Decision(BaseModel):
    """The value of an option that the service has chosen. `words` name the value in a sentence.

    Example: the words "learning rate 0.00025", and the reason "the student starts from fitted
    layers".
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    option: str  # path within `method.distillation`
    value: Any  # Any: JSON
    reason: str
    words: str

    @property
    def public(self) -> dict[str, Any]:
        """The decision in the result of a job."""
        return {"option": self.option, "value": self.value, "reason": self.reason}

    def event(self, prefix: str = "") -> MessageLine:
        """Returns the event that reports the decision."""
        message = f"{prefix}{self.words}, because {self.reason}"
        return MessageLine(message=message, data=self.public)
