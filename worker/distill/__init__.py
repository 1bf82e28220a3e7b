"""Distils a teacher into a student. Knows neither queue nor database."""
