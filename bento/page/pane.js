// One result: the text of one model with its numbers, and this model's side of a conversation.

import { complete } from "./api.js";

export const ALTERNATIVES = 5;
export const SPEAKERS = { user: "You", assistant: "Model" };
const FINISHED = { stop: "The text ended.", length: "As many tokens as asked for." };

const percent = (logprob) => `${(100 * Math.exp(logprob)).toFixed(logprob < -4.6 ? 2 : 1)} %`;
const seconds = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(2)} s`);
const transcript = (turns) => turns.map(({ role, content }) => `${SPEAKERS[role]}: ${content}\n\n`).join("");

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

export class Pane {
  /** suffix: of the ids of its elements. */
  constructor(suffix = "") {
    this.suffix = suffix;
    this.messages = []; // of the conversation, in chat
    this.model = null; // name, null until it is known
    this.base = document.baseURI; // address of the model's service
  }

  /** A second pane with the first one's elements, placed after it. */
  static copyOf(first) {
    const pane = new Pane("-2");
    const element = first.$("result").cloneNode(true);
    for (const one of [element, ...element.querySelectorAll("[id]")]) one.id += pane.suffix;
    first.$("result").after(element);
    pane.$("output").setAttribute("aria-labelledby", pane.$("result-title").id);
    return pane;
  }

  $(id) {
    return document.getElementById(id + this.suffix);
  }

  get name() {
    return this.model ?? this.base;
  }

  get text() {
    return this.$("output").textContent;
  }

  /** The request's fields of the text: a prompt, or the conversation so far and the next message. */
  continued(text, isChat) {
    return isChat ? { messages: [...this.messages, { role: "user", content: text }] } : { prompt: text };
  }

  clear() {
    this.messages = [];
    for (const id of ["given", "generated"]) this.$(id).textContent = "";
    this.say("A new conversation.");
  }

  say(text) {
    this.$("status").textContent = text;
  }

  setBusy(isBusy) {
    this.$("output").setAttribute("aria-busy", String(isBusy));
    for (const id of ["copy", "continue"]) this.$(id).disabled = isBusy || !this.$("generated").textContent;
  }

  /** Generate and show the text; then the turn is part of the conversation once `keepTurn` is called. */
  async run(body, { key, signal }) {
    const output = this.$("output");
    const times = { started: performance.now(), first: null, last: null, now: 0, tokens: 0, firstTokens: 0 };
    let held = [];
    let finish = "The server did not say why the text ended.";
    this.$("given").textContent = body.messages ? `${transcript(body.messages)}${SPEAKERS.assistant}: ` : body.prompt;
    this.$("generated").textContent = "";
    this.say("Generating …");
    times.now = times.started;
    this.showNumbers(times);
    try {
      for await (const piece of complete(body, { base: this.base, key, model: this.model, signal })) {
        const { text, finishReason, tokens, scores } = piece;
        times.now = performance.now();
        times.tokens = tokens ?? times.tokens;
        if (text) {
          if (times.first === null) Object.assign(times, { first: times.now, firstTokens: times.tokens });
          times.last = times.now;
          const follows = output.scrollHeight - output.scrollTop - output.clientHeight < 40;
          this.$("generated").append(pieceOf(text, [...held, ...scores]));
          held = [];
          if (follows) output.scrollTop = output.scrollHeight;
        }
        if (!text) held.push(...scores); // bytes of a character that a later token completes
        if (finishReason) finish = FINISHED[finishReason] ?? `Ended: ${finishReason}.`;
        this.showNumbers(times);
      }
      this.say(finish);
    } catch (error) {
      times.now = performance.now();
      if (times.tokens) this.showNumbers(times);
      this.fail(error, !times.tokens);
      throw error;
    }
  }

  keepTurn(body) {
    this.messages = [...body.messages, { role: "assistant", content: this.$("generated").textContent }];
  }

  fail(error, hasNoNumbers = true) {
    if (hasNoNumbers) for (const id of ["first-token", "speed", "tokens", "time"]) this.$(id).textContent = "–";
    this.say(error.name === "AbortError" ? "Stopped." : "Failed.");
  }

  /** Times in milliseconds; firstTokens: how many tokens the first piece of text was. */
  showNumbers({ started, first, last, now, tokens, firstTokens }) {
    this.$("first-token").textContent = first === null ? "–" : seconds(first - started);
    this.$("tokens").textContent = tokens;
    this.$("time").textContent = seconds(now - started);
    // The time to the first chunk is prefill, so it is left out of the rate.
    const rate = last > first ? (1000 * (tokens - firstTokens)) / (last - first) : null;
    this.$("speed").textContent = rate === null ? "–" : `${rate < 10 ? rate.toFixed(1) : Math.round(rate)} tokens/s`;
  }
}
