"""The API in this process, and the objects of a project."""

from tests.app.api.conftest import client, http, register, service

__all__ = ["client", "http", "register", "service"]
