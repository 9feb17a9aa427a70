"""Effects of abusive clients on the service's other clients, and of a long mixed load on its memory."""
