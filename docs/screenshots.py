"""Takes the documentation's pictures of Dagster's pages in a headless browser: `make screenshots`.

    make screenshots EXPERIMENT=stdlib

Starts the pages of `make ui` on free ports over this checkout's var/, where `make pipeline EXPERIMENT=...` has run.
Needs Debian's packages `chromium` and `chromium-driver`.
"""

import argparse
import base64
import io
import os
import subprocess
import sys
import tempfile
import urllib.parse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from selenium.webdriver import Chrome
from selenium.webdriver.support.wait import WebDriverWait

from bench.server import free_port
from llm_assets.experiments.compose import DEFAULT_EXPERIMENT
from llm_assets.latest import latest_artifacts
from llm_assets.registry import PIPELINE, SOURCE_TEXT
from model.errors import PipelineError, ends_in_one_line
from tests.bento.page.browser import browser, missing, set_viewport

WAIT_S = 120
COLORS = 128
_DRAWN = """
// The boxes of the assets that are drawn: the smallest elements with their names, outside the list at the left.
return arguments[0].map((name) => {
  const path = `//*[text()='${name}']`;
  const found = document.evaluate(path, document, null, XPathResult.ORDERED_NODE_SNAPSHOT_TYPE, null);
  for (let i = 0; i < found.snapshotLength; i++) {
    const box = found.snapshotItem(i).closest("foreignObject")?.getBoundingClientRect();
    if (box && box.width) return [box.left, box.top, box.right, box.bottom];
  }
  return null;
});
"""
_PICTURES = """
// Pictures that are loaded and have a size on the page: their titles.
return [...document.images].filter((image) => image.naturalWidth && image.clientWidth && image.alt).map((i) => i.alt);
"""


def lineage_address(address: str) -> str:
    """The lineage page with the groups of the stages unfolded, filtered to leave out the settings."""
    groups = ",".join(f"global@global:{group}" for group in dict.fromkeys(stage.group for stage in PIPELINE))
    selection = urllib.parse.quote('not group:"settings"')
    return f"{address}/asset-groups~{selection}?{urllib.parse.urlencode({'expanded': groups})}"


def partition_address(address: str, asset: str, experiment: str) -> str:
    """The page of an asset's partition."""
    return f"{address}/assets/{asset}?view=partitions&partition={experiment}"


def boxes(driver: Chrome, assets: Sequence[str]) -> list[list[float]]:
    """Left, top, right and bottom of each asset that the lineage page draws; waits until all are there."""

    def drawn(page: Chrome) -> Any:
        found = page.execute_script(_DRAWN, list(assets))
        return found if all(found) else None

    return [list(box) for box in WebDriverWait(driver, WAIT_S).until(drawn)]


def text_of(driver: Chrome, *expected: str) -> str:
    """The visible text of the page, once it contains all of `expected`."""

    def shown(page: Chrome) -> str | None:
        text = str(page.execute_script("return document.body.innerText"))
        return text if all(part in text for part in expected) else None

    return str(WebDriverWait(driver, WAIT_S).until(shown))


def pictures(driver: Chrome) -> list[str]:
    """The titles of the pictures that are visible on the page; waits for the first."""
    return list(WebDriverWait(driver, WAIT_S).until(lambda page: page.execute_script(_PICTURES)))


def save(driver: Chrome, file: Path, clip: Sequence[float]) -> None:
    """Write a part of the page, given as left, top, right, bottom, as PNG."""
    left, top, right, bottom = clip
    area = {"x": left, "y": top, "width": right - left, "height": bottom - top, "scale": 1}
    taken = driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png", "clip": area})
    with Image.open(io.BytesIO(base64.b64decode(taken["data"]))) as image:
        image.convert("RGB").quantize(COLORS).save(file, optimize=True)
    print(file)


@contextmanager
def pages() -> Iterator[str]:
    """Dagster's address, while `llm_assets.ui` runs."""
    port, mlflow_port = free_port(), free_port()
    command = [sys.executable, "-m", "llm_assets.ui", "--port", str(port), "--mlflow-port", str(mlflow_port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            if not process.stdout.readline():
                raise PipelineError("the pages did not start: see the servers' output in var/ui/")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def take(driver: Chrome, address: str, experiment: str, into: Path) -> None:
    """Write `asset_graph.png` and `asset_page.png`."""
    set_viewport(driver, 2600, 1250)
    driver.get(lineage_address(address))
    names = [SOURCE_TEXT, *(stage.name for stage in PIPELINE)]
    found = boxes(driver, names)
    WebDriverWait(driver, WAIT_S).until(lambda page: text_of(page).count("% filled") == len(names))
    sides = [list(side) for side in zip(*found, strict=True)]
    save(
        driver,
        into / "asset_graph.png",
        (min(sides[0]) - 30, min(sides[1]) - 80, max(sides[2]) + 30, max(sides[3]) + 50),
    )
    set_viewport(driver, 1400, 900)
    driver.get(partition_address(address, "trained_checkpoint", experiment))
    pictures(driver)
    text_of(driver, "bits per byte")
    save(driver, into / "asset_page.png", (240, 0, 1400, 900))


@ends_in_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("experiment", nargs="?", default=DEFAULT_EXPERIMENT, help=f"default: {DEFAULT_EXPERIMENT}")
    into = Path(__file__).parent / "pictures"
    parser.add_argument("--into", type=Path, default=into, help="folder, default: docs/pictures")
    given = parser.parse_args(argv)
    if missing():
        raise PipelineError(f"no browser to take pictures with: {missing()}")
    if "DAGSTER_HOME" not in os.environ:
        raise PipelineError("DAGSTER_HOME is not set, so the pages would show no run: use `make screenshots`")
    latest_artifacts(given.experiment)  # raises if an asset is missing, with the command that makes it
    given.into.mkdir(parents=True, exist_ok=True)
    with pages() as address, tempfile.TemporaryDirectory() as profile, browser(Path(profile)) as driver:
        take(driver, address, given.experiment, given.into)
    return 0


if __name__ == "__main__":
    sys.exit(main())
