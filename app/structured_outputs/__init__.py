"""Rules for structured outputs: which JSON Schemas, regexes and grammars are accepted."""
