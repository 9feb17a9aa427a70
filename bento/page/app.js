// The page: fields in, streamed text out. Text of users and models is only ever set as textContent.

import { ApiError, complete, modelName } from "./api.js";

const $ = (id) => document.getElementById(id);
const NUMBERS = ["max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"];
const WHOLE = new Set(["max_tokens", "top_k", "seed"]);
const FIELDS = { ...Object.fromEntries(["prompt", ...NUMBERS].map((name) => [name, $(name)])), stop: $("stop_strings") };
const FINISHED = { stop: "The text ended.", length: "As many tokens as asked for." };
const KEY = "rex-api-key";

const ALTERNATIVES = 5;
const SPEAKERS = { user: "You", assistant: "Model" };
const messages = []; // of the conversation, in chat

let running = null; // AbortController of the generation under way
let model = null;

// ---- Request

/** Reject values that cannot be sent: a browser hides the text of an invalid number. */
function check(name) {
  const field = FIELDS[name];
  if (field.validity.badInput) throw new ApiError(`${name} is not a number`, { param: name });
  // JavaScript rounds larger integers, so the request would differ from the input.
  if (WHOLE.has(name) && Math.abs(field.valueAsNumber) > Number.MAX_SAFE_INTEGER) {
    throw new ApiError(`${name} is larger than this page can send: at most ${Number.MAX_SAFE_INTEGER}`, { param: name });
  }
}

const ESCAPES = { "\\n": "\n", "\\t": "\t", "\\\\": "\\" };

function stopStrings() {
  const lines = FIELDS.stop.value.split("\n").filter((line) => line !== "");
  return lines.map((line) => line.replace(/\\[nt\\]/g, (escape) => ESCAPES[escape]));
}

/** The request's body; an empty field leaves the server's default. */
function request() {
  const text = FIELDS.prompt.value;
  const isChat = $("chat").checked;
  const body = isChat ? { messages: [...messages, { role: "user", content: text }] } : { prompt: text };
  if ($("probabilities").checked) {
    Object.assign(body, isChat ? { logprobs: true, top_logprobs: ALTERNATIVES } : { logprobs: ALTERNATIVES });
  }
  for (const name of NUMBERS) {
    check(name);
    if (FIELDS[name].value !== "") body[name] = FIELDS[name].valueAsNumber;
  }
  const stop = stopStrings();
  if (stop.length) body.stop = stop;
  return body;
}

// ---- Address: prompt and parameters stand behind the #, which no browser sends to a server; the key never does.

function writeAddress() {
  const kept = new URLSearchParams();
  for (const [name, field] of Object.entries(FIELDS)) if (field.value !== field.defaultValue) kept.set(name, field.value);
  for (const name of ["chat", "probabilities"]) {
    if ($(name).checked !== $(name).defaultChecked) kept.set(name, String($(name).checked));
  }
  history.replaceState(null, "", kept.size ? `#${kept}` : location.pathname + location.search);
}

function readAddress() {
  const kept = new URLSearchParams(location.hash.slice(1));
  for (const [name, field] of Object.entries(FIELDS)) field.value = kept.get(name) ?? field.defaultValue;
  for (const name of ["chat", "probabilities"]) {
    $(name).checked = kept.has(name) ? kept.get(name) === "true" : $(name).defaultChecked;
  }
}

// ---- Display

const percent = (logprob) => `${(100 * Math.exp(logprob)).toFixed(logprob < -4.6 ? 2 : 1)} %`;

/** A piece of text; its title lists each token's probability and those of the likeliest tokens at its place. */
function pieceOf(text, scores) {
  const piece = document.createElement("span");
  piece.textContent = text;
  const lines = scores.map(({ text: token, logprob, others }) => {
    const rest = others.filter(([other]) => other !== token).slice(0, ALTERNATIVES);
    const instead = rest.map(([other, score]) => `${JSON.stringify(other)} ${percent(score)}`).join("\n  ");
    return `${JSON.stringify(token)} ${percent(logprob)}${instead && `\ninstead of\n  ${instead}`}`;
  });
  if (lines.length) piece.title = lines.join("\n");
  return piece;
}

const transcript = (turns) => turns.map(({ role, content }) => `${SPEAKERS[role]}: ${content}\n\n`).join("");

function showMode() {
  const isChat = $("chat").checked;
  $("prompt-label").textContent = isChat ? "Message" : "Prompt";
  $("clear").hidden = !isChat;
  $("continue").hidden = isChat;
}

function clearConversation() {
  messages.length = 0;
  for (const id of ["given", "generated"]) $(id).textContent = "";
  $("status").textContent = "A new conversation.";
}

const seconds = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(2)} s`);

/** Times in milliseconds; firstTokens: how many tokens the first piece of text was. */
function showNumbers({ started, first, last, now, tokens, firstTokens }) {
  $("first-token").textContent = first === null ? "–" : seconds(first - started);
  $("tokens").textContent = tokens;
  $("time").textContent = seconds(now - started);
  // The time to the first chunk is prefill, so it is left out of the rate.
  const rate = last > first ? (1000 * (tokens - firstTokens)) / (last - first) : null;
  $("speed").textContent = rate === null ? "–" : `${rate < 10 ? rate.toFixed(1) : Math.round(rate)} tokens/s`;
}

function clearNumbers() {
  for (const id of ["first-token", "speed", "tokens", "time"]) $(id).textContent = "–";
}

function showError(error) {
  const wait = error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "";
  $("error").textContent = error.message + wait;
  $("error").hidden = false;
  const field = error.status === 401 ? $("key") : FIELDS[error.param === "messages" ? "prompt" : error.param];
  if (!field) return;
  if (error.status === 401) $("key-hint").textContent = "this server wants a key";
  if ($("options").contains(field)) $("options").open = true;
  field.setAttribute("aria-invalid", "true");
  field.setAttribute("aria-errormessage", "error");
  field.focus();
}

function clearError() {
  $("error").hidden = true;
  $("error").textContent = "";
  for (const field of document.querySelectorAll("[aria-invalid]")) {
    field.removeAttribute("aria-invalid");
    field.removeAttribute("aria-errormessage");
  }
}

function setRunning(controller) {
  const hadFocus = document.activeElement;
  running = controller;
  const isRunning = controller !== null;
  $("output").setAttribute("aria-busy", String(isRunning));
  $("generate").disabled = isRunning;
  $("stop").disabled = !isRunning;
  for (const id of ["copy", "continue"]) $(id).disabled = isRunning || !$("generated").textContent;
  // Disabling the focused button would drop keyboard focus.
  if (isRunning && [$("generate"), $("continue")].includes(hadFocus)) $("stop").focus();
  if (!isRunning && hadFocus === $("stop")) $("generate").focus();
}

// ---- Actions

async function generate() {
  if (running) return;
  clearError();
  const output = $("output");
  const times = { started: performance.now(), first: null, last: null, now: 0, tokens: 0, firstTokens: 0 };
  let held = [];
  let finish = "The server did not say why the text ended.";
  try {
    const body = request();
    writeAddress();
    $("given").textContent = body.messages ? `${transcript(body.messages)}${SPEAKERS.assistant}: ` : body.prompt;
    $("generated").textContent = "";
    setRunning(new AbortController());
    $("status").textContent = "Generating …";
    const options = { key: $("key").value.trim(), model, signal: running.signal };
    times.started = times.now = performance.now();
    showNumbers(times);
    for await (const { text, finishReason, tokens, scores } of complete(body, options)) {
      times.now = performance.now();
      times.tokens = tokens ?? times.tokens;
      if (text) {
        if (times.first === null) Object.assign(times, { first: times.now, firstTokens: times.tokens });
        times.last = times.now;
        const follows = output.scrollHeight - output.scrollTop - output.clientHeight < 40;
        $("generated").append(pieceOf(text, [...held, ...scores]));
        held = [];
        if (follows) output.scrollTop = output.scrollHeight;
      }
      if (!text) held.push(...scores); // bytes of a character that a later token completes
      if (finishReason) finish = FINISHED[finishReason] ?? `Ended: ${finishReason}.`;
      showNumbers(times);
    }
    $("status").textContent = finish;
    if (body.messages) {
      messages.splice(0, Infinity, ...body.messages, { role: "assistant", content: $("generated").textContent });
      FIELDS.prompt.value = "";
    }
  } catch (error) {
    times.now = performance.now();
    if (times.tokens) showNumbers(times);
    else clearNumbers();
    $("status").textContent = error.name === "AbortError" ? "Stopped." : "Failed.";
    if (error.name !== "AbortError") {
      setRunning(null);
      showError(error);
    }
  } finally {
    setRunning(null);
  }
}

const stop = () => running?.abort();

async function showModel() {
  try {
    model = await modelName($("key").value.trim());
  } catch {
    model = null; // the first request shows the error
  }
  if (model) $("model").textContent = model;
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
$("stop").addEventListener("click", stop);
$("copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText($("output").textContent);
    $("status").textContent = "Copied.";
  } catch {
    // Browsers allow clipboard writes only over HTTPS or from localhost.
    getSelection().selectAllChildren($("output"));
    $("status").textContent = "Selected: copy it as usual.";
  }
});
$("continue").addEventListener("click", () => {
  FIELDS.prompt.value = $("output").textContent;
  generate();
});
$("clear").addEventListener("click", clearConversation);
$("chat").addEventListener("change", () => {
  showMode();
  clearConversation();
});
addEventListener("hashchange", () => {
  readAddress();
  showMode();
});
$("key").addEventListener("change", () => {
  sessionStorage.setItem(KEY, $("key").value.trim());
  showModel();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running) {
    event.preventDefault();
    stop();
  } else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    generate();
  }
});

$("key").value = sessionStorage.getItem(KEY) ?? "";
readAddress();
showMode();
$("options").open = matchMedia("(min-width: 60rem)").matches;
showModel();
