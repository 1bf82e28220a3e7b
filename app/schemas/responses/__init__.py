"""Bodies of /v1/responses: requests as chats, and answers as typed items and events."""
