"""Queries and changes of webhook endpoints, events and deliveries."""
