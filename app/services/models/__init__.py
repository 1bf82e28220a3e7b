"""Rules of the model registry: files, aliases, deletion, uploads and cards of models."""
