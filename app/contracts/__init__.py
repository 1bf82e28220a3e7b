"""What crosses a process boundary: messages between API and workers, and the distillation block of a job."""
