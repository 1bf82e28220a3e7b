"""The dashboard: static files that the API serves at `/`, and the code that loads them."""
