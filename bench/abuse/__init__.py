"""What a service's clients can do to each other, and what a long mixed load does to its memory."""
