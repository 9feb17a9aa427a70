"""Program that reads and fills BentoML's stores; `bentos.py` runs it in a separate process.

    python bento_store.py model NAME:VERSION DIRECTORY LABELS_JSON     import a model directory unless the store has it
    python bento_store.py bento NAME:VERSION                           find a Bento
    python bento_store.py missing BENTO_TAG MODEL_TAG                  the first tag that the stores do not have
    python bento_store.py export NAME:VERSION DIRECTORY                copy a Bento with its models to a new directory

The last line of output is JSON: the entry of the store, or null if there is no such Bento.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def import_model(tag: str, directory: str, labels: str) -> dict[str, Any]:
    """Import a directory under `tag`; a failed import leaves nothing in the store."""
    import bentoml
    from bentoml.exceptions import NotFound

    created = False
    try:
        model = bentoml.models.get(tag)
    except NotFound:
        with bentoml.models.create(tag, labels=json.loads(labels)) as model:
            shutil.copytree(directory, model.path, dirs_exist_ok=True)
        model, created = bentoml.models.get(tag), True
    return {**_described(str(model.tag), Path(model.path)), "created": created}


def find_bento(tag: str) -> dict[str, Any] | None:
    """The Bento `tag`, or None."""
    import bentoml
    from bentoml.exceptions import NotFound

    try:
        bento = bentoml.bentos.get(tag)
    except NotFound:
        return None
    return _described(str(bento.tag), Path(bento.path))


def find_missing(bento: str, model: str) -> dict[str, str]:
    """`{"tag"}`: of the Bento or the model, if one is not in its store; else empty."""
    import bentoml
    from bentoml.exceptions import NotFound

    for tag, store in ((bento, bentoml.bentos), (model, bentoml.models)):
        try:
            store.get(tag)
        except NotFound:
            return {"tag": tag}
    return {"tag": ""}


def export(tag: str, directory: str) -> dict[str, Any]:
    """Copy the Bento `tag` and its models to a directory that `bentoml serve` takes; every user may read it.

    BentoML's own export is not used: it temporarily adds the models to the Bento's folder in the store.
    """
    import bentoml
    from bentoml.models import BentoModel

    bento = bentoml.bentos.get(tag)
    shutil.copytree(bento.path, directory)
    models = Path(directory, "models")
    models.mkdir()
    info: Any = bento.info  # BentoML has two types of it; ours is the one with an image
    for model in info.all_models:
        BentoModel(str(model.tag)).resolve(models)
    for path in Path(directory).rglob("*"):
        path.chmod(0o755 if path.is_dir() else path.stat().st_mode & 0o111 | 0o644)
    return {"base_image": info.image.base_image, "python_version": info.image.python_version}


def _described(tag: str, path: Path) -> dict[str, Any]:
    return {"tag": tag, "path": str(path), "bytes": sum(p.stat().st_size for p in path.rglob("*") if p.is_file())}


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    commands: dict[str, Callable[..., Any]] = {
        "model": import_model,
        "bento": find_bento,
        "missing": find_missing,
        "export": export,
    }
    print(json.dumps(commands[command](*arguments)))
