// What the pipeline as a whole does: its state, its workers, its requests.

import { health } from "./api.js";

const EACH_MS = 1000;
const $ = (id) => document.getElementById(id);
const percent = (share) => (share == null ? "–" : `${Math.round(100 * share)} %`);

/** Looks each second while the page is seen. `say` tells whoever does not see it. */
export class Watch {
  #lanes;
  #say;
  #restarts; // of the draft worker, when it was last seen
  #draft; // whether there was one; undefined: never
  #state = "";
  #looked = 0;
  #timer;

  constructor(lanes, say) {
    this.#lanes = lanes;
    this.#say = say;
    document.addEventListener("visibilitychange", () => this.look());
  }

  /** Look now, and go on looking. */
  async look() {
    clearTimeout(this.#timer);
    const told = await health().catch(() => null);
    this.#show(told);
    clearTimeout(this.#timer);
    if (!document.hidden) this.#timer = setTimeout(() => this.look(), EACH_MS);
  }

  /** What is over need not be told any more. */
  settle() {
    if (this.#draft) $("notice").hidden = true;
  }

  #show(told) {
    const workers = Object.entries(told?.workers ?? {});
    const hasDraft = workers.some(([, one]) => one.role === "draft");
    $("running").textContent = told?.requests?.running ?? "–";
    $("waiting").textContent = told?.requests?.waiting ?? "–";
    if (told?.status === "ok") this.#follow(hasDraft, told.restarts?.draft ?? 0);
    this.#tell(told, hasDraft);
    const lines = ["target", "draft"].flatMap((role) => {
      const found = workers.filter(([, one]) => one.role === role);
      return found.length ? found : [[role, undefined]];
    });
    $("workers").replaceChildren(...lines.map(([name, one]) => worker(name, one, this.#draft)));
    this.#looked = performance.now();
  }

  /** Notice that the draft went, came back, or did both between two looks. */
  #follow(isThere, restarts) {
    const isOther = this.#restarts !== undefined && restarts !== this.#restarts;
    if (this.#draft && (!isThere || isOther)) {
      this.#lanes.lost(Math.min(1, (performance.now() - this.#looked) / 1000));
      this.#notice("The draft worker was lost. Answers go on without it, with the same text.");
    }
    if (isThere && (this.#draft === false || isOther)) {
      this.#lanes.found();
      const time = new Date().toLocaleTimeString();
      this.#notice(`The draft worker was lost, and is back since ${time}.`);
    }
    if (isThere) this.#restarts = restarts;
    this.#draft = isThere || (this.#draft === undefined ? undefined : false);
  }

  #notice(text) {
    $("notice").textContent = text;
    $("notice").hidden = false;
    this.#say(text);
  }

  #tell(told, hasDraft) {
    let [state, words] = ["wait", "not reached"];
    if (told?.status === "ok") {
      if (hasDraft) [state, words] = ["ok", "ready"];
      else [state, words] = this.#draft === false ? ["lost", "draft lost"] : ["ok", "without a draft"];
    } else if (told) words = told.error?.message?.toLowerCase() ?? "starting";
    $("state").dataset.state = state;
    $("state").textContent = words;
    if (words !== this.#state && this.#state) this.#say(`The pipeline: ${words}.`);
    this.#state = words;
  }
}

/** One that is not there is called by its role. */
function worker(name, told, hadDraft) {
  const item = document.createElement("li");
  const title = document.createElement("b");
  title.textContent = name;
  const absent = name === "draft" && hadDraft === false ? "lost" : "not there";
  const busy = told ? `computing ${percent(told.busy)} of the time` : absent;
  item.append(title, told ? ` ${told.model}, ${busy}` : ` ${busy}`);
  return item;
}

/** The figures of an answer, as they are so far. */
export function figures(stats) {
  const about = stats.speedup_kind === "estimate" ? "≈ " : "";
  const speedup = stats.speedup == null ? "–" : `${about}${stats.speedup.toFixed(1)}×`;
  $("acceptance").textContent = percent(stats.acceptance_rate);
  $("speed").textContent = stats.tokens_per_s == null ? "–" : stats.tokens_per_s.toFixed(1);
  $("speedup").textContent = speedup;
  $("overlap").textContent = percent(stats.overlap);
  $("drafted").textContent = stats.accepted_tokens - stats.truncated_tokens;
  $("corrected").textContent = stats.corrections;
  $("bonus").textContent = stats.bonuses;
  $("plain").textContent = stats.plain_tokens;
}

/** The same in a line. */
export function summary(stats) {
  const parts = [`${stats.generated_tokens} tokens`];
  if (stats.tokens_per_s != null) parts.push(`${stats.tokens_per_s.toFixed(1)} a second`);
  if (stats.speedup != null) {
    parts.push(`${stats.speedup.toFixed(1)}× the target alone (${stats.speedup_kind})`);
  }
  if (stats.acceptance_rate != null) parts.push(`${percent(stats.acceptance_rate)} accepted`);
  return parts.join(" · ");
}

/** What the picture of the lanes shows, in words. */
export function described(stats) {
  return (
    `Both lanes of the last answer, ${stats.mode}: the target computed ` +
    `${percent(stats.target_busy)} of the time, the draft ${percent(stats.draft_busy)}, ` +
    `${percent(stats.overlap)} of that while the target computed too.`
  );
}
