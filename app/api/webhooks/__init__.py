"""Routes of webhook endpoints."""
