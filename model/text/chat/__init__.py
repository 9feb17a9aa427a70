"""Chats: the template and its marks, conversations in files, and functions that a model may call, as text."""
