"""Services for those who operate the service."""
