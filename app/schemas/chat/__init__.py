"""Parts of the bodies of chats: messages, tools, and the format of the answer."""
