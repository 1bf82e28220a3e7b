"""Leases jobs, runs each in a child process and records its reports. Never imports torch."""
