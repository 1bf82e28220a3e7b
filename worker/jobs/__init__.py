"""Leases jobs, starts a process for each and records what it reports. Never imports torch."""
