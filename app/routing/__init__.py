"""Takes one request to one serve worker, and the worker's tokens back to the coroutine that waits for them."""
