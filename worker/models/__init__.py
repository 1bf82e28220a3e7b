"""What a model folder is: architectures, checks, downloads and file formats."""
