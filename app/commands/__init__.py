"""Commands of the `stillhouse` command line."""
