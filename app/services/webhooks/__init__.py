"""Delivers events of jobs and batches to the webhook endpoints of their projects."""
