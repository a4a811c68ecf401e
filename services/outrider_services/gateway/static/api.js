// The gateway as this page asks it: with the key, with errors that are one sentence.

const KEY = "outrider-key";
const LONGEST = 1 << 22; // characters of one event

/** What the gateway refuses, or a connection that is not there. */
export class Refused extends Error {
  constructor(message, status = 0) {
    super(sentence(message));
    this.status = status;
  }
}

/** The key of this tab; "" for none. */
export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (text) => sessionStorage.setItem(KEY, text),
};

function sentence(text) {
  const words = String(text).trim() || "something failed";
  return words[0].toUpperCase() + words.slice(1) + (/[.!?…]$/.test(words) ? "" : ".");
}

/** The response at `path`, which is relative: a proxy may have put a prefix in front. */
async function request(path, options) {
  const headers = { "Content-Type": "application/json" };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  try {
    return await fetch(path, { ...options, headers, credentials: "omit", cache: "no-store" });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new Refused("the gateway cannot be reached");
  }
}

async function refusal(response) {
  const told = await response.json().catch(() => ({}));
  const again = response.headers.get("Retry-After");
  const wait = again && response.status === 429 ? `; try again in ${again} s` : "";
  return new Refused(`${told.error?.message ?? `status ${response.status}`}${wait}`, response.status);
}

/** What /health tells, also while it is "loading". */
export async function health() {
  const response = await request("health", { signal: AbortSignal.timeout(3000) });
  return response.json();
}

/** The model's name, which is told to whoever has a key. Throws Refused. */
export async function model() {
  const response = await request("v1/models", { signal: AbortSignal.timeout(5000) });
  if (!response.ok) throw await refusal(response);
  return (await response.json()).data[0].id;
}

/** The chunks of an answer. Throws Refused; aborting `signal` ends it at the server, too. */
export async function* answer(body, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    body: JSON.stringify({ ...body, stream: true, return_provenance: true }),
    signal,
  });
  if (!response.ok) throw await refusal(response);
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refused(chunk.error.message);
    yield chunk;
  }
  throw new Refused("the connection has ended before the answer");
}

/** The data of each server-sent event. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (text + value).split("\n\n");
      text = parts.pop();
      for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
      if (text.length > LONGEST) throw new Refused("the gateway sends what is no answer");
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
