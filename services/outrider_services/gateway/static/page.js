// The page: its fields and keys, and who is told what.

import * as api from "./api.js";
import { Chat } from "./chat.js";
import { Lanes } from "./lanes.js";
import { described, figures, summary, Watch } from "./pipeline.js";

const $ = (id) => document.getElementById(id);
const chat = new Chat();
const lanes = new Lanes($("lanes"));
const watch = new Watch(lanes, say);

/** For whoever hears the page instead of seeing it: only what changes what can be done. */
function say(text) {
  $("status").textContent = text;
}

function problem(text) {
  $("problem").textContent = text;
}

// ---- a question and its answer ------------------------------------------------------------------

async function send() {
  const text = $("say").value;
  if (!text.trim() || chat.isBusy) return;
  let stats;
  $("say").value = "";
  begin();
  try {
    const outcome = await chat.say(text, (chunk) => {
      const told = chunk.outrider;
      if (!told) return;
      stats = told.stats ?? stats;
      lanes.add(told.spans, told.tokens);
      if (told.stats) figures(told.stats);
    });
    if (!outcome) restore(text);
    say(outcome ? `${outcome}. ${stats ? summary(stats) : ""}` : "Stopped.");
  } catch (error) {
    failed(error, text);
  } finally {
    over(stats);
  }
}

function begin() {
  problem("");
  say("Answering.");
  watch.settle();
  lanes.begin();
  busy(true);
}

/** What was not answered stands in the field again. */
function restore(text) {
  if (!$("say").value) $("say").value = text;
}

function failed(error, text) {
  restore(text);
  if (error.status === 401) {
    askKey(api.key.get() !== "");
    return;
  }
  problem(error instanceof api.Refused ? error.message : "This page has failed; reload it.");
  if (!(error instanceof api.Refused)) console.error(error);
}

function over(stats) {
  lanes.end();
  busy(false);
  if (stats) $("lanes").setAttribute("aria-label", described(stats));
  $("back-s").min = -Math.ceil(lanes.past * 10) / 10;
  $("back-s").value = 0;
  $("back").hidden = lanes.past < 0.5;
}

/** The focus never stays on a button that goes. */
function busy(isBusy) {
  const hadFocus = [$("send"), $("stop")].includes(document.activeElement);
  $("send").hidden = isBusy;
  $("stop").hidden = !isBusy;
  if (isBusy) $("back").hidden = true;
  if (hadFocus) $(isBusy ? "stop" : "say").focus();
}

function fresh() {
  chat.clear();
  problem("");
  say("A new conversation.");
  $("say").focus();
}

// ---- the key ------------------------------------------------------------------------------------

async function open() {
  try {
    $("model").textContent = await api.model();
    $("other-key").hidden = !api.key.get();
    const isFree = $("ask-key").open || document.activeElement === document.body;
    $("ask-key").close();
    if (isFree) $("say").focus();
  } catch (error) {
    if (error.status === 401) askKey(api.key.get() !== "");
    else if (error.status === 503) setTimeout(open, 2000); // the model is being loaded
    else problem(error instanceof api.Refused ? error.message : "The gateway does not answer.");
  }
}

function askKey(wasWrong) {
  $("key-problem").textContent = wasWrong ? "This service does not know that key." : "";
  if (!$("ask-key").open) $("ask-key").showModal();
  $("key").select();
}

function useKey(event) {
  event.preventDefault();
  const text = $("key").value.trim();
  if (!/^[\x20-\x7e]*$/.test(text)) {
    $("key-problem").textContent = "A key has printable ASCII characters only.";
    return;
  }
  api.key.set(text);
  open();
}

// ---- what is pressed ----------------------------------------------------------------------------

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("say").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.isComposing && !$("ask-key").open) chat.stop();
});
$("stop").addEventListener("click", () => chat.stop());
$("fresh").addEventListener("click", fresh);
$("other-key").addEventListener("click", () => askKey(false));
$("key-form").addEventListener("submit", useKey);
$("marks").addEventListener("change", (event) => {
  $("turns").classList.toggle("unmarked", !event.target.checked);
});
$("back-s").addEventListener("input", (event) => {
  lanes.back = -Number(event.target.value);
  event.target.setAttribute("aria-valuetext", `${lanes.back.toFixed(1)} seconds before the end`);
  lanes.draw();
});

$("more").open = matchMedia("(min-width: 54rem)").matches; // else the answer needs the room
watch.look();
open();
