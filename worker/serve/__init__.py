"""Generates text for many requests at once. Knows neither queue nor database."""
