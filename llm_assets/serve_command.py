"""`bentoml serve`, which says in one line that a Bento is not there.

BentoML's command line takes commands from the packages of the environment (entry points of the group
`bentoml.commands`, see `pyproject.toml`); one of a known name takes the place of BentoML's own. This one is BentoML's
own, but for the answer to a tag that is neither in the store nor a module, which there has four lines and no next step.

Not in the package `bento`: the command line would import that from here before a Bento's own copy.
"""

import copy
import functools
import importlib.util
from typing import Any

import click
from bentoml_cli.serve import serve_command
from bentoml_cli.utils import BentoMLCommandGroup


def replace_serve() -> click.Command:
    """BentoML's command with another answer to what is not there."""
    command = copy.copy(serve_command.commands["serve"])
    original = command.callback
    assert original is not None
    # The group adds the options that all its commands have to each that it is given.
    command.params = command.params[: -BentoMLCommandGroup.NUMBER_OF_COMMON_PARAMS]
    # Likewise what it wraps around each callback: reporting usage, and errors as BentoML prints them.
    undecorated = original.__wrapped__.__wrapped__  # type: ignore[attr-defined]

    @functools.wraps(undecorated)
    def serve(*args: Any, **kwargs: Any) -> Any:
        from bentoml.exceptions import ImportServiceError

        try:
            return undecorated(*args, **kwargs)
        except ImportServiceError:
            if _is_module(kwargs["bento"].partition(":")[0]):
                raise
            raise click.ClickException(_not_there(kwargs["bento"])) from None

    command.callback = serve
    return command


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # a parent package that is not there, a path
        return False


def _not_there(bento: str) -> str:
    from bentoml._internal.configuration.containers import BentoMLContainer

    store = BentoMLContainer.bento_store.get()
    return (
        f"no Bento {bento!r} in {store._path}, and no module of that name: `bentoml list` shows what is there, "
        "`make pipeline` packages one"
    )


serve = replace_serve()
