"""Response bodies for those who operate the service."""
