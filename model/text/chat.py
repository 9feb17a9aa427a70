"""The text form of a conversation, shared by the fine-tuning corpus and the tokenizer's chat template.

A document of a corpus of conversations is `opening(prompt) + response`; the end-of-text token that follows every
document ends the assistant's turn. The roles are plain text, so a base model's vocabulary stays as it is.
"""

USER, ASSISTANT = "### User:\n", "\n\n### Assistant:\n"

TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{ message['content'] + eos_token }}
{%- elif message['role'] == 'user' -%}
{{ '### User:\\n' + message['content'] + '\\n\\n### Assistant:\\n' }}
{%- else -%}
{{ message['content'] + '\\n\\n' }}
{%- endif -%}
{%- endfor -%}"""
"""Jinja, for `PreTrainedTokenizerFast.chat_template`. A user's turn always ends with the assistant's heading."""


def opening(prompt: str) -> str:
    """The text that precedes a response. Raises ValueError for a prompt that contains the assistant's heading."""
    if ASSISTANT in prompt:
        raise ValueError(f"the prompt holds {ASSISTANT!r}, which starts the response")
    return USER + prompt + ASSISTANT


def response_start(document: str) -> int:
    """Index of the response's first character. Raises ValueError if the text is not a conversation."""
    at = document.find(ASSISTANT)
    if at < 0 or not document.startswith(USER):
        raise ValueError("no conversation")
    return at + len(ASSISTANT)
