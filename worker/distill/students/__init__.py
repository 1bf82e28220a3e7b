"""Builds students: by dropping layers, by pruning their width, with LoRA, or from scratch."""
