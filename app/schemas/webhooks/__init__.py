"""Request and response bodies of webhook endpoints."""
