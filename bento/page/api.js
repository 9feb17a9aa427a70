// The service's HTTP API as this page uses it. base: address of the service; that of the page, whatever prefix a proxy adds.

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

/** A service's models, {id, hasChat} each, without aliases; empty if it lists none or does not answer. */
export async function models(base, key) {
  try {
    const response = await fetch(new URL("v1/models", base), { headers: authorization(key) });
    const { data } = response.ok ? await response.json() : {};
    const own = (data ?? []).filter(({ root, id }) => (root ?? id) === id);
    return own.map(({ id, has_chat_template: hasChat }) => ({ id, hasChat: Boolean(hasChat) }));
  } catch {
    return []; // the first request shows the error
  }
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
export async function* complete(request, { base, key, model, signal }) {
  let response;
  try {
    response = await fetch(new URL(request.messages ? "v1/chat/completions" : "v1/completions", base), {
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
