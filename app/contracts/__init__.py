"""Data that crosses process boundaries: messages between API and workers, and job options."""
