// The page: fields in, streamed text out. Text of users and models is only ever set as textContent.

import { ApiError, models } from "./api.js";
import { ALTERNATIVES, Pane } from "./pane.js";

const $ = (id) => document.getElementById(id);
const NUMBERS = ["max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"];
const WHOLE = new Set(["max_tokens", "top_k", "seed"]);
const FIELDS = { ...Object.fromEntries(["prompt", ...NUMBERS].map((name) => [name, $(name)])), stop: $("stop_strings") };
const CHOICES = ["chat", "probabilities", "compare"];
const KEY = "rex-api-key";
const CONTINUED = FIELDS.prompt.placeholder;

const first = new Pane();
const second = Pane.copyOf(first);
const panes = [first, second];
/** The panes that are shown: both while two models are compared. */
const shown = () => ($("compare").checked && hasSecond ? panes : [first]);

let running = null; // AbortController of the generation under way
let hasSecond = false; // whether there is a model to compare with

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

/** The request's parameters; an empty field leaves the server's default. */
function request() {
  const body = {};
  if ($("probabilities").checked) {
    Object.assign(body, $("chat").checked ? { logprobs: true, top_logprobs: ALTERNATIVES } : { logprobs: ALTERNATIVES });
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
  for (const name of CHOICES) {
    if ($(name).checked !== $(name).defaultChecked) kept.set(name, String($(name).checked));
  }
  history.replaceState(null, "", kept.size ? `#${kept}` : location.pathname + location.search);
}

function readAddress() {
  const kept = new URLSearchParams(location.hash.slice(1));
  for (const [name, field] of Object.entries(FIELDS)) field.value = kept.get(name) ?? field.defaultValue;
  readChoices(CHOICES);
}

function readChoices(names) {
  const kept = new URLSearchParams(location.hash.slice(1));
  for (const name of names) {
    $(name).checked = kept.has(name) ? kept.get(name) === "true" : $(name).defaultChecked;
  }
}

// ---- Display

function showMode() {
  const isChat = $("chat").checked;
  $("prompt-label").textContent = isChat ? "Message" : "Prompt";
  FIELDS.prompt.placeholder = isChat ? "Your message" : CONTINUED;
  $("clear").hidden = !isChat;
  for (const pane of panes) pane.$("continue").hidden = isChat;
  const isCompared = shown().length > 1;
  $("results").classList.toggle("both", isCompared);
  second.$("result").hidden = !isCompared;
  for (const pane of panes) pane.$("result-title").textContent = isCompared ? pane.name : "Result";
}

/** Chat is the default of a chat model, unless the address says otherwise. */
function setDefaultMode(isChat) {
  if ($("chat").defaultChecked === isChat) return;
  $("chat").defaultChecked = isChat;
  readChoices(["chat"]);
}

function clearConversation() {
  for (const pane of panes) pane.clear();
}

function showError(error) {
  const wait = error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "";
  $("error").textContent = error.message + wait;
  $("error").hidden = false;
  const field = error.status === 401 ? $("key") : FIELDS[error.param === "messages" ? "prompt" : error.param];
  if (!field) return;
  if (error.status === 401) $("key-hint").textContent = "this server requires a key";
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

function setRunning(controller, active) {
  const hadFocus = document.activeElement;
  running = controller;
  const isRunning = controller !== null;
  for (const pane of active) pane.setBusy(isRunning);
  $("chat").disabled = isRunning;
  $("compare").disabled = isRunning || !hasSecond;
  $("generate").disabled = isRunning;
  $("stop").disabled = !isRunning;
  // Disabling the focused button would drop keyboard focus.
  if (isRunning && [$("generate"), ...panes.map((pane) => pane.$("continue"))].includes(hadFocus)) $("stop").focus();
  if (!isRunning && hadFocus === $("stop")) $("generate").focus();
}

// ---- Actions

/** The error to show: the first pane's, else the second's with its model's name; undefined without one. */
function failureOf(results) {
  const at = results.findIndex(({ reason }) => reason && reason.name !== "AbortError");
  const { reason } = results[at] ?? {};
  if (at > 0) reason.message = `${panes[at].name}: ${reason.message}`;
  return reason;
}

async function generate() {
  if (running) return;
  clearError();
  const active = shown();
  try {
    const [text, isChat, parameters] = [FIELDS.prompt.value, $("chat").checked, request()];
    writeAddress();
    setRunning(new AbortController(), active);
    const options = { key: $("key").value.trim(), signal: running.signal };
    const bodies = active.map((pane) => ({ ...pane.continued(text, isChat), ...parameters }));
    const results = await Promise.allSettled(active.map((pane, at) => pane.run(bodies[at], options)));
    setRunning(null, active);
    const failure = failureOf(results);
    if (failure) showError(failure);
    if (isChat && results.every(({ status }) => status === "fulfilled")) {
      active.forEach((pane, at) => pane.keepTurn(bodies[at]));
      FIELDS.prompt.value = "";
    }
  } catch (error) {
    setRunning(null, active);
    for (const pane of active) pane.fail(error);
    showError(error);
  }
}

const stop = () => running?.abort();

/** Ask for the models: the served one, and a second one of this service or of the service that the page names. */
async function findModels() {
  const key = $("key").value.trim();
  const named = document.querySelector("meta[name=compare-with]").content;
  const [own, others] = await Promise.all([models(first.base, key), named ? models(named, key) : []]);
  first.model = own[0]?.id ?? null;
  setDefaultMode(Boolean(own[0]?.hasChat));
  if (first.model) $("model").textContent = first.model;
  second.base = named || first.base;
  second.model = (named ? others[0] : own[1])?.id ?? null;
  hasSecond = Boolean(named || second.model);
  $("compare").disabled = Boolean(running) || !hasSecond;
  if (hasSecond) $("compare-hint").textContent = `the same request to ${second.name}`;
  showMode();
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
$("stop").addEventListener("click", stop);
for (const pane of panes) {
  pane.$("copy").addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(pane.text);
      pane.say("Copied.");
    } catch {
      // Browsers allow clipboard writes only over HTTPS or from localhost.
      getSelection().selectAllChildren(pane.$("output"));
      pane.say("Selected: copy it as usual.");
    }
  });
  pane.$("continue").addEventListener("click", () => {
    FIELDS.prompt.value = pane.text;
    generate();
  });
}
$("clear").addEventListener("click", clearConversation);
for (const id of ["chat", "compare"]) {
  $(id).addEventListener("change", () => {
    showMode();
    if ($("chat").checked || id === "chat") clearConversation();
  });
}
addEventListener("hashchange", () => {
  readAddress();
  showMode();
});
$("key").addEventListener("change", () => {
  sessionStorage.setItem(KEY, $("key").value.trim());
  findModels();
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
findModels();
