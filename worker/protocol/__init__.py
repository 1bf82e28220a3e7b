"""Protocol between the supervisor and a run process: the spec file and the lines of output."""
