"""From files of conversations to batches of tokens, and the teacher's written answers."""
