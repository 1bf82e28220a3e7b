"""End-to-end tests. This file makes the folder a package, so that its shared service ends with it."""
