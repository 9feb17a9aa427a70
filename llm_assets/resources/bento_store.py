"""Program that reads and fills BentoML's stores; `bentos.py` runs it in a process of its own.

    python bento_store.py model NAME:VERSION DIRECTORY LABELS_JSON     import a model directory unless it is there
    python bento_store.py bento NAME:VERSION                           find a Bento

The last line printed is JSON: what was found, null for a Bento that is not there.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any


def import_model(tag: str, directory: str, labels: str) -> dict[str, Any]:
    """Import a directory under `tag`; a directory that fails half-way leaves nothing in the store."""
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


def _described(tag: str, path: Path) -> dict[str, Any]:
    return {"tag": tag, "path": str(path), "bytes": sum(p.stat().st_size for p in path.rglob("*") if p.is_file())}


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    print(json.dumps(import_model(*arguments) if command == "model" else find_bento(*arguments)))
