"""Builds students: by dropping layers, by narrowing them, from scratch, or with LoRA."""
