"""The `stillhouse` command line."""
