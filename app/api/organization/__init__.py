"""Routes about the whole service, with the paths that OpenAI has for an organization."""
