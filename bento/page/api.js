// The service's HTTP API as this page uses it. Addresses are relative, so that the page works behind a path prefix.

import { readEvents } from "./sse.js";

/** An error response, with the server's message. status: HTTP status, 0 without a response. param: field or null. */
export class ApiError extends Error {
  constructor(message, { status = 0, param = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, param, retryAfter });
  }
}

// Usage in every chunk: a chunk may hold several tokens, and an aborted stream has no final chunk.
const STREAM_OPTIONS = { include_usage: true, continuous_usage_stats: true };

const address = (path) => new URL(path, document.baseURI);

const authorization = (key) => (key ? { Authorization: `Bearer ${key}` } : {});

async function refusal(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // A proxy in between may answer without JSON.
  }
  return new ApiError(error.message ?? `The server answered ${response.status} ${response.statusText}`.trim(), {
    status: response.status,
    param: error.param ?? null,
    retryAfter: response.headers.get("Retry-After"),
  });
}

/** The served model's name; null if the server does not list one. */
export async function modelName(key) {
  const response = await fetch(address("v1/models"), { headers: authorization(key) });
  if (!response.ok) return null;
  return (await response.json()).data?.[0]?.id ?? null;
}

/** The tokens of a piece: {text, logprob, others: [[text, logprob], ...]} each; both routes' forms. */
function scoresOf(logprobs) {
  if (logprobs?.content) {
    return logprobs.content.map(({ token, logprob, top_logprobs: top }) => ({
      text: token,
      logprob,
      others: top.map((other) => [other.token, other.logprob]),
    }));
  }
  return (logprobs?.tokens ?? []).map((text, at) => ({
    text,
    logprob: logprobs.token_logprobs[at],
    others: Object.entries(logprobs.top_logprobs?.[at] ?? {}),
  }));
}

/**
 * Continue a prompt, or a conversation where the request has messages: gives {text, tokens, scores} for each piece,
 * tokens being the number generated so far, and {finishReason} when the text has ended.
 * Throws ApiError if the server refuses or fails, AbortError if `signal` aborted it.
 */
export async function* complete(request, { key, model, signal }) {
  let response;
  try {
    response = await fetch(address(request.messages ? "v1/chat/completions" : "v1/completions"), {
      method: "POST",
      headers: { "Content-Type": "application/json", Accept: "text/event-stream", ...authorization(key) },
      body: JSON.stringify({ ...(model && { model }), ...request, stream: true, stream_options: STREAM_OPTIONS }),
      signal,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached: is it running?");
  }
  if (!response.ok) throw await refusal(response);
  try {
    for await (const data of readEvents(response.body)) {
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ApiError(event.error.message, { param: event.error.param ?? null });
      const choice = event.choices?.[0];
      yield {
        text: choice?.text ?? choice?.delta?.content,
        finishReason: choice?.finish_reason,
        tokens: event.usage?.completion_tokens,
        scores: scoresOf(choice?.logprobs),
      };
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiError) throw error;
    throw new ApiError("The connection broke before the text was complete.");
  }
  throw new ApiError("The connection ended before the text was complete.");
}
