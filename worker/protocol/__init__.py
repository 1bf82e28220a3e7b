"""What the supervisor and a run process tell each other: the spec file and the lines of progress."""
