"""A registered model whose versions are scores in a file."""

from pathlib import Path
from typing import Any

import pytest

from llm_assets.resources.mlflow import MlflowTracking
from llm_assets.versions.promotion import Contest
from llm_assets.versions.register import add_measurements, register_version
from tests.support.paired_scores import compare_scores, write_scores


class Registry:
    """One registered model, `rex-NAME`."""

    def __init__(self, mlflow: MlflowTracking, name: str, folder: Path) -> None:
        self.client, self.experiment_id = mlflow.client()
        self.name, self.folder = f"rex-{name}", folder
        self.lines: list[str] = []

    def register(
        self, bits: float, content: str = "", *, text: str = "a", asset: str = "quantized_model", **decision: Any
    ) -> str:
        """decision: noise and latency_ratio of the comparison with the champion, most_latency_ratio, objections."""
        measured = {name: decision.pop(name) for name in ("noise", "latency_ratio") if name in decision}
        bound = decision.pop("most_latency_ratio", 0.0)
        write_scores(self.folder, bits, text)
        return register_version(
            self.client,
            self.client.create_run(self.experiment_id).info.run_id,
            self.name,
            self.folder,
            asset=asset,
            bits_per_byte=bits,
            evaluation_text=text,
            candidate=True,
            content_hash=content,
            log=self.lines.append,
            **{"contest": Contest(compare_scores(self.folder, text, **measured), bound), **decision},
        )

    def measure(self, content: str, found: dict[str, str], bits: float | None = None) -> dict[str, Any]:
        """Add measurements of registered content; bits: of its score, where it may be decided on again."""
        if bits is not None:
            write_scores(self.folder, bits)
        return add_measurements(
            self.client,
            self.name,
            "quantized_model",
            content,
            found,
            contest=Contest(compare_scores(self.folder) if bits is not None else None),
            log=self.lines.append,
        )

    @property
    def champion(self) -> str | None:
        found = self.client.get_registered_model(self.name).aliases.get("champion")
        return str(found) if found else None

    def decision(self, version: str) -> str:
        return str(self.client.get_model_version(self.name, version).tags["champion_decision"])

    def set_by_hand(self, version: str) -> None:
        self.client.set_registered_model_alias(self.name, "champion", version)


@pytest.fixture
def registry(mlflow: MlflowTracking, request: pytest.FixtureRequest, tmp_path: Path) -> Registry:
    return Registry(mlflow, request.node.name[-60:], tmp_path)
