"""Grammars of answers: compiles them, masks logits with them, and validates complete answers."""
