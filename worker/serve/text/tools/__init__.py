"""Tool calls in the text of a model: formats, incremental parsers and grammars."""
