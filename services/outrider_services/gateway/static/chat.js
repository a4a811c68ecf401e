// The conversation: what was said, and the answer that comes.

import { answer, Refused } from "./api.js";
import { Pieces, show } from "./tokens.js";
import { summary } from "./pipeline.js";

const FIELDS = ["temperature", "top_p", "max_tokens", "seed"];
const $ = (id) => document.getElementById(id);

/** What differs from the server's. Throws Refused for a setting that is no number: everything else is for the server to say. */
function settings() {
  const found = {};
  for (const name of FIELDS) {
    const text = $(name).value.trim().replace(",", ".");
    if (text === "") continue;
    found[name] = Number(text);
    if (!Number.isFinite(found[name])) throw new Refused(`${name} must be a number, not ${text}`);
  }
  if (!$("speculative").checked) found["speculative.enabled"] = false;
  return found;
}

/** One conversation at a time, with at most one answer on its way. */
export class Chat {
  #said = []; // {role, content}
  #ending; // aborts the answer that comes

  get isBusy() {
    return this.#ending !== undefined;
  }

  stop() {
    this.#ending?.abort();
  }

  /** Forget what was said. */
  clear() {
    this.stop();
    this.#said = [];
    for (const turn of $("turns").querySelectorAll("article")) turn.remove();
    $("empty").hidden = false;
  }

  /**
   * Say `text`; `hear` is called with each chunk of the answer. Tells how it ended, in words; ""
   * if it was stopped before there was an answer: then, as if it throws Refused, nothing was said.
   */
  async say(text, hear) {
    const system = $("system").value.trim();
    const question = { role: "user", content: text };
    const messages = [...(system ? [{ role: "system", content: system }] : []), ...this.#said];
    const body = { messages: [...messages, question], ...settings() };
    const ending = (this.#ending = new AbortController());
    const asked = turn("user");
    asked.text.textContent = text;
    const told = new Turn();
    let outcome;
    try {
      outcome = await this.#hear(told, answer(body, ending.signal), ending.signal, hear);
    } finally {
      if (this.#ending === ending) this.#ending = undefined;
      told.end(outcome);
      if (!told.isThere) forget(asked, told);
    }
    // else it is of a conversation that was left
    if (asked.article.isConnected) {
      this.#said.push(question, { role: "assistant", content: told.text });
    }
    return outcome;
  }

  /** How it ended; an answer of which something came is kept, whatever happens then. */
  async #hear(told, chunks, signal, hear) {
    try {
      for await (const chunk of chunks) {
        told.add(chunk);
        hear(chunk);
      }
    } catch (error) {
      if (signal.aborted) return told.isThere ? "Stopped" : "";
      const known = error instanceof Refused ? error : new Refused("the connection was lost");
      if (!told.isThere) throw known;
      return `Cut off: ${known.message}`;
    }
    return told.ending;
  }
}

/** The answer in the conversation, as it comes. */
class Turn {
  text = "";
  #pieces = new Pieces();
  #stats;
  #finish;
  #parts = turn("assistant");

  constructor() {
    this.#parts.article.setAttribute("aria-busy", "true");
  }

  add(chunk) {
    const choice = chunk.choices?.[0];
    const told = chunk.outrider ?? {};
    const text = choice?.delta?.content ?? "";
    this.text += text;
    this.#finish = choice?.finish_reason ?? this.#finish;
    this.#stats = told.stats ?? this.#stats;
    const turns = $("turns");
    const isAtEnd = turns.scrollHeight - turns.scrollTop - turns.clientHeight < 60;
    show(this.#parts.text, this.#pieces.take(text, told.tokens ?? []));
    if (isAtEnd) turns.scrollTop = turns.scrollHeight;
  }

  /** Whether something came, if only its end. */
  get isThere() {
    return Boolean(this.text || this.#finish);
  }

  get ending() {
    return { length: "Ended at the most tokens", cancelled: "Cancelled" }[this.#finish] ?? "Complete";
  }

  end(outcome) {
    this.#parts.article.removeAttribute("aria-busy");
    const figures = this.#stats ? summary(this.#stats) : "";
    const words = outcome === "Complete" ? [figures] : [outcome, figures];
    this.#parts.foot.textContent = words.filter(Boolean).join(" · ");
    $("turns").scrollTop = $("turns").scrollHeight;
  }

  remove() {
    this.#parts.article.remove();
  }
}

function forget(asked, told) {
  asked.article.remove();
  told.remove();
  $("empty").hidden = $("turns").querySelector("article") !== null;
}

/** A turn's elements, put at the end of the conversation. */
function turn(role) {
  const [article, who, text, foot] = ["article", "h3", "div", "p"].map((name) =>
    document.createElement(name),
  );
  article.className = role;
  who.textContent = role === "user" ? "You" : "Answer";
  text.className = "text";
  text.dir = "auto";
  foot.className = "small";
  article.append(who, text, foot);
  $("empty").hidden = true;
  $("turns").append(article);
  $("turns").scrollTop = $("turns").scrollHeight;
  return { article, text, foot };
}
