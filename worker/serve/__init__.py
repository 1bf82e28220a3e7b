"""Text generation for many requests at once, independent of the queue and the database."""
