// The server's native API: requests, errors in plain words, and a job's events over however many connections it takes.

import { recall, remember } from "./memory.js";

const KEY = "madformer-key";
const WAITS = [0.5, 1, 2, 4, 8]; // seconds before the tries to reach a server again
let askForKey = async () => null;
let apiKey = recall(KEY, { tab: true });

/** What the server refused, or that it does not answer. `status` is 0 where no answer came. */
export class ApiError extends Error {
  constructor(message, { status = 0, type = "", retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, type, retryAfter });
  }
}

export const hasKey = () => apiKey !== null;
/** `ask(again)` is called where the server wants a key, and gives one or null. */
export const onKeyWanted = (ask) => { askForKey = ask; };

/** The answer of `path`, relative to the page. Raises ApiError for every other than a success. */
export async function call(path, { method = "GET", body, accept = "application/json", signal, last, quiet = false } = {}) {
  for (let again = false; ; again = true) {
    const headers = { Accept: accept };
    if (body !== undefined) headers["Content-Type"] = "application/json";
    if (last !== undefined) headers["Last-Event-ID"] = last;
    if (apiKey !== null) headers.Authorization = `Bearer ${apiKey}`;
    let response;
    try {
      response = await fetch(path, { method, headers, signal, body: body && JSON.stringify(body), cache: "no-store" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError("The server does not answer. Is it still running?");
    }
    if (response.ok) return response;
    const error = await errorOf(response);
    if (response.status !== 401 || quiet) throw error;
    const key = await askForKey(again);
    if (!key) throw error;
    apiKey = key;
    remember(KEY, key, { tab: true });
  }
}

async function errorOf(response) {
  let said = {};
  try {
    const { error, detail } = await response.json();
    said = error ?? { message: typeof detail === "string" ? detail : detail?.map((one) => `${one.loc?.at(-1)}: ${one.msg}`).join("; ") };
  } catch { /* a proxy's own page says less than the status does */ }
  const retryAfter = Number(response.headers.get("Retry-After")) || null;
  const { status } = response;
  const wait = retryAfter ? ` It asks to try again in ${retryAfter} s.` : "";
  const own = {
    401: "This server asks for a key.",
    403: "This key may not do that.",
    404: "The server no longer knows this request.",
    413: "The request is larger than the server takes.",
    429: `The server has as much to do as it takes.${wait}`,
    503: `The server is starting or about to stop.${wait}`,
  }[status];
  const message = [401, 429, 503].includes(status) ? own : said.message ?? own ?? `The server failed (${status}).`;
  return new ApiError(message, { status, type: said.type, retryAfter });
}

/** What an event says of a request, or of one of its images, that failed. */
export const failureOf = ({ error }) => new ApiError(error.message, { status: 500, type: error.type });

/** Server-sent events of an answer, as { type, id, data }, with the data read as JSON. */
export async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", type = "", id, data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield { type: type || "message", id, data: JSON.parse(data.join("\n")) };
          type = "";
          data = [];
          continue;
        }
        const [, field, text] = /^([^:]*):? ?(.*)$/s.exec(line);
        if (field === "event") type = text;
        else if (field === "data") data.push(text);
        else if (field === "id") id = text;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/**
 * A request's events until the last. A broken connection is made again, and goes on after the event that came last.
 * @param start the body of a request, or the id of one that is under way
 * @param signal ends it, and cancels the request at the server
 */
export async function* drawing(start, signal) {
  const accept = "text/event-stream";
  const again = (id, last) => call(`api/v1/images/${encodeURIComponent(id)}/events`, { accept, signal, last });
  let id = typeof start === "string" ? start : null, last, failures = 0;
  let response = id ? await again(id) : await call("api/v1/images", { method: "POST", body: start, accept, signal });
  try {
    for (;;) {
      try {
        for await (const event of response ? eventsOf(response) : []) {
          ({ id: last } = event);
          id = event.data.id ?? id;
          failures = 0;
          if (event.type === "error" && event.data.index === undefined) throw failureOf(event.data);
          yield event;
          if (event.type === "done") return;
        }
      } catch (error) {
        if (error instanceof ApiError || signal.aborted) throw error;
      }
      if (id === null || failures === WAITS.length) throw new ApiError("The connection to the server broke, and it does not answer.");
      await pause(WAITS[failures++], signal);
      try {
        response = await again(id, last);
      } catch (error) {
        if (!(error instanceof ApiError) || (error.status !== 0 && error.status !== 503)) throw error;
        response = null;
      }
    }
  } finally {
    if (signal.aborted && id) call(`api/v1/images/${encodeURIComponent(id)}`, { method: "DELETE", quiet: true }).catch(() => {});
  }
}

const pause = (seconds, signal) => new Promise((resolve, reject) => {
  const timer = setTimeout(resolve, 1000 * seconds);
  signal.addEventListener("abort", () => { clearTimeout(timer); reject(signal.reason); }, { once: true });
});

export function bytesOf(base64, format) {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  return new Blob([bytes], { type: `image/${format}` });
}

/** A picture's bytes as base64, as a request takes it. */
export const base64Of = (blob) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
  reader.onerror = () => reject(reader.error);
  reader.readAsDataURL(blob);
});
