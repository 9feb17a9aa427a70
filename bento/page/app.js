// The page: fields in, streamed text out. Text of users and models is only ever set as textContent.

import { ApiError, complete, modelName } from "./api.js";

const $ = (id) => document.getElementById(id);
const NUMBERS = ["max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"];
const WHOLE = new Set(["max_tokens", "top_k", "seed"]);
const FIELDS = { ...Object.fromEntries(["prompt", ...NUMBERS].map((name) => [name, $(name)])), stop: $("stop_strings") };
const FINISHED = { stop: "The text ended.", length: "As many tokens as asked for." };
const KEY = "rex-api-key";

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
  const body = { prompt: FIELDS.prompt.value };
  for (const name of NUMBERS) {
    check(name);
    if (FIELDS[name].value !== "") body[name] = FIELDS[name].valueAsNumber;
  }
  const stop = stopStrings();
  if (stop.length) body.stop = stop;
  return body;
}

// ---- Display

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
  const field = error.status === 401 ? $("key") : FIELDS[error.param];
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
  let finish = "The server did not say why the text ended.";
  try {
    const body = request();
    $("given").textContent = body.prompt;
    $("generated").textContent = "";
    setRunning(new AbortController());
    $("status").textContent = "Generating …";
    const options = { key: $("key").value.trim(), model, signal: running.signal };
    times.started = times.now = performance.now();
    showNumbers(times);
    for await (const { text, finishReason, tokens } of complete(body, options)) {
      times.now = performance.now();
      times.tokens = tokens ?? times.tokens;
      if (text) {
        if (times.first === null) Object.assign(times, { first: times.now, firstTokens: times.tokens });
        times.last = times.now;
        const follows = output.scrollHeight - output.scrollTop - output.clientHeight < 40;
        $("generated").append(text);
        if (follows) output.scrollTop = output.scrollHeight;
      }
      if (finishReason) finish = FINISHED[finishReason] ?? `Ended: ${finishReason}.`;
      showNumbers(times);
    }
    $("status").textContent = finish;
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
$("options").open = matchMedia("(min-width: 60rem)").matches;
showModel();
