"""OpenTelemetry traces, an optional extra."""
