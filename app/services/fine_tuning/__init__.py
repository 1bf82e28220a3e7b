"""Rules of fine-tuning jobs that have no teacher, and of their rows."""
