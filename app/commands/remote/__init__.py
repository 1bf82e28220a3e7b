"""Commands that work over HTTP: jobs, files, batches, models, generation and usage."""
