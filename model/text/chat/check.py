"""Checks the chat template of a tokenizer, which comes with a checkpoint, before a conversation needs it.

A template that Jinja cannot compile, or whose rendering does not end, is refused. One that refuses some conversations
is not: which ones it takes is its author's choice.
"""

import ctypes
import re
import threading
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.errors import PipelineError, json_type
from model.text.chat.template import has_marks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MAX_RENDERING_S = 10.0
"""Time for rendering the conversations of `TRIALS`, which takes milliseconds."""
_USER, _ASSISTANT = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}
TRIALS = ([_USER], [{"role": "system", "content": "Be brief"}, _USER, _ASSISTANT, _USER])
_GENERATION_BLOCK = re.compile(r"{%-?\s*(?:end)?generation\s*-?%}")
_REMEDY = "correct it, fetch the model again, or remove the template: the model then continues texts only"


def check_templates(tokenizer: "PreTrainedTokenizerFast", directory: Path) -> None:
    """Raises PipelineError, one line that names the file and the line in the template."""
    found: Any = tokenizer.chat_template
    if not found or has_marks(tokenizer):
        return
    for name, template in (found if isinstance(found, dict) else {"default": found}).items():
        _check(template, _source(directory, name))
    _render_in_time(tokenizer, _source(directory, "default"))


def _source(directory: Path, name: str) -> str:
    single = directory / "chat_template.jinja"
    path = single if name == "default" else directory / "additional_chat_templates" / f"{name}.jinja"
    return str(path) if path.is_file() else f"{directory / 'tokenizer_config.json'}: chat_template"


def _check(template: Any, source: str) -> None:
    from jinja2 import TemplateSyntaxError

    if not isinstance(template, str):
        raise PipelineError(f"{source} is a {json_type(template)}: expected a template in Jinja; {_REMEDY}")
    try:
        variables(template)
    except TemplateSyntaxError as error:
        found = " ".join((error.message or "not Jinja").split())
        raise PipelineError(f"{source}, line {error.lineno}: {found}; {_REMEDY}") from None
    except (SyntaxError, RecursionError):  # of Python, which Jinja compiles to
        raise PipelineError(f"{source} is nested too deep: expected a template in Jinja; {_REMEDY}") from None


@lru_cache(maxsize=8)
def variables(template: str) -> frozenset[str]:
    """The variables that a template reads. Raises jinja2's TemplateSyntaxError for one that cannot be compiled."""
    from jinja2 import meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    plain = _GENERATION_BLOCK.sub("", template)  # a tag of transformers
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    environment.compile(plain)  # finds unknown filters and tests, which parsing does not
    return frozenset(meta.find_undeclared_variables(environment.parse(plain)))


def _render_in_time(tokenizer: "PreTrainedTokenizerFast", source: str) -> None:
    def render() -> None:
        with suppress(SystemExit):
            for messages in TRIALS:
                with suppress(Exception):  # a template may refuse a conversation
                    tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    thread = threading.Thread(target=render, daemon=True)
    thread.start()
    thread.join(MAX_RENDERING_S)
    if thread.is_alive():
        # Nothing else ends a loop of another thread.
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
        raise PipelineError(
            f"{source} does not end within {MAX_RENDERING_S:.0f} s for a conversation of {len(TRIALS[0])} message: "
            f"expected milliseconds; {_REMEDY}"
        )
