"""Model folders: supported architectures, file checks, downloads and file formats."""
