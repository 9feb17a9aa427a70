"""OpenAI's Node SDK and Vercel's AI SDK with their real packages, where there are node, npm and the npm registry."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from model.text.chat.template import TEMPLATE
from tests.bento.openai_service import MODEL, Service, on_a_port, running_service

pytestmark = [
    pytest.mark.processes,
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("npm") or not shutil.which("node"), reason="no node and npm (apt install npm)"),
]
PACKAGES = {"openai": "^6.49.0", "ai": "^6.0.326", "@ai-sdk/openai-compatible": "^2.0.92", "zod": "^4.6.7"}
PROGRAM = """\
import OpenAI from "openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embed, generateObject, generateText, streamText, tool } from "ai";
import { z } from "zod";

const [baseURL, model] = process.argv.slice(2);
const messages = [{ role: "user", content: "größer?" }];
const properties = { a: { enum: [1, 2] } };
const number = { type: "object", properties, required: ["a"], additionalProperties: false };
const city = { name: "city", strict: true, schema: number };
const found = {};

const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const asked = { model, messages, max_tokens: 8, temperature: 0 };
found.models = (await client.models.list()).data.map(({ id }) => id);
const whole = await client.chat.completions.create(asked);
found.whole = [whole.choices[0].message.content, whole.choices[0].finish_reason, whole.usage.completion_tokens];
found.streamed = "";
for await (const chunk of await client.chat.completions.create({ ...asked, stream: true })) {
  found.streamed += chunk.choices[0].delta.content ?? "";
}
const format = { type: "json_schema", json_schema: city };
const structured = await client.chat.completions.create({ ...asked, max_tokens: 60, response_format: format });
found.structured = JSON.parse(structured.choices[0].message.content);
found.vector = (await client.embeddings.create({ model, input: "a" })).data[0].embedding.length;
found.response = (await client.responses.create({ model, input: "x", max_output_tokens: 8 })).status;
try {
  await client.chat.completions.create({ ...asked, temperature: -1 });
} catch (error) {
  found.refused = [error.constructor.name, error.status, error.param];
}
const alone = new AbortController();
const long = { ...asked, max_tokens: 8000, stream: true };  // node hangs if it aborts a stream that has just ended
const endless = await client.chat.completions.create(long, { signal: alone.signal });
for await (const _ of endless) alone.abort();

const chat = createOpenAICompatible({ name: "rex", baseURL, supportsStructuredOutputs: true, includeUsage: true });
const same = { model: chat(model), prompt: "größer?", maxOutputTokens: 8, temperature: 0, maxRetries: 0 };
found.text = (await generateText(same)).text;
found.parts = "";
const stream = streamText(same);
for await (const part of stream.textStream) found.parts += part;
found.usage = (await stream.usage).outputTokens;
const schema = z.object({ a: z.union([z.literal(1), z.literal(2)]) });
found.object = (await generateObject({ ...same, schema, maxOutputTokens: 60 })).object;
const tools = { weather: tool({ description: "The weather.", inputSchema: schema }) };
const { toolCalls } = await generateText({ ...same, tools, toolChoice: "required", maxOutputTokens: 90, seed: 1 });
found.calls = toolCalls.map(({ toolName, input }) => [toolName, input.a]);
found.embedded = (await embed({ model: chat.textEmbeddingModel(model), value: "a" })).embedding.length;
console.log(JSON.stringify(found));
"""


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running_service(chat_template=TEMPLATE, context=8192) as running:
        yield running


@pytest.fixture(scope="module")
def found(service, tmp_path_factory) -> dict:
    """The program's answers."""
    folder: Path = tmp_path_factory.mktemp("node")
    (folder / "package.json").write_text(json.dumps({"private": True, "type": "module", "dependencies": PACKAGES}))
    (folder / "clients.mjs").write_text(PROGRAM)
    install = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--fetch-retries=1"]
    installed = subprocess.run(install, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    unreached = re.search(r"\b(ECONNREFUSED|ECONNRESET|ENOTFOUND|ENETUNREACH|ETIMEDOUT|EAI_AGAIN)\b", installed.stderr)
    if installed.returncode and unreached:
        pytest.skip(f"the npm registry does not answer ({unreached[0]})")
    assert installed.returncode == 0, installed.stderr
    with on_a_port(service.app) as url:
        done = subprocess.run(
            ["node", "clients.mjs", f"{url}/v1", MODEL],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_openais_node_sdk_has_answers_streams_forms_and_errors(service, found):
    assert found["models"] == [MODEL]
    text, reason, tokens = found["whole"]
    assert (reason, tokens) == ("length", 8) and found["streamed"] == text
    assert found["structured"]["a"] in (1, 2)
    assert found["vector"] == service.engine.hidden_size
    assert found["response"] == "incomplete"
    assert found["refused"] == ["BadRequestError", 400, "temperature"]


def test_vercels_ai_sdk_has_answers_streams_objects_and_calls(service, found):
    assert found["text"] == found["parts"] == found["whole"][0] and found["usage"] == 8
    assert found["object"]["a"] in (1, 2)
    assert found["calls"] and all(name == "weather" and value in (1, 2) for name, value in found["calls"])
    assert found["embedded"] == service.engine.hidden_size
