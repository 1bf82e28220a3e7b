"""Tables, ids and migrations."""
