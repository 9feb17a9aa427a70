"""Writes the tables of options into the documentation, from the fields that declare them: `make docs`.

A table stands between `<!-- generated: NAME -->` and `<!-- /generated -->`, where NAME is a group of an experiment's
options, or `service` for the variables of the service. `--check` writes nothing and fails if a page is out of date.
"""

import argparse
import re
import sys
from pathlib import Path

from bento.options import variables
from llm_assets.experiments.explain import as_table
from model.settings import GROUPS, options

PAGES = [Path(__file__).with_name(name) for name in ("configuration.md", "serving.md")]
_TABLE = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- /generated -->)", re.DOTALL)


def generated(page: str) -> str:
    """The text of a page with regenerated tables."""

    def table(match: re.Match[str]) -> str:
        items = variables() if match[2] == "service" else options(GROUPS[match[2]])
        return f"{match[1]}\n{as_table(items)}\n\n{match[3]}"

    return _TABLE.sub(table, page)


def main() -> int:
    """Write the pages, or check them."""
    parser = argparse.ArgumentParser(prog="python docs/generate.py", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if a page is out of date")
    check = parser.parse_args().check
    outdated = [page for page in PAGES if generated(page.read_text()) != page.read_text()]
    for page in outdated:
        if check:
            print(f"{page.name} differs from the options: run `make docs`", file=sys.stderr)
        else:
            page.write_text(generated(page.read_text()))
    return int(check and bool(outdated))


if __name__ == "__main__":
    sys.exit(main())
