/* Requests to the service that wait and go on by themselves, and what this tab remembers.
   Not here: anything that is shown. */

const KEY = "embedding-service.key";
const ASK_MS = 30_000;
const SEND_MS = 120_000; // a document may be large, and the way to the service slow
const LONGEST_WAIT_S = 300;
const BUSY = new Set([429, 502, 503, 504]);

/* Tells "reached", "unreachable" and "key-wanted" (detail: whether a key was given and refused). */
export const client = new EventTarget();

/** The tab's own storage: gone with the tab, or with a reload where the browser forbids it. */
export const remembered = {
  fallback: new Map(),
  get(name) {
    try {
      return sessionStorage.getItem(name);
    } catch {
      return this.fallback.get(name) ?? null;
    }
  },
  set(name, value) {
    try {
      if (value === null) sessionStorage.removeItem(name);
      else sessionStorage.setItem(name, value);
    } catch {
      if (value === null) this.fallback.delete(name);
      else this.fallback.set(name, value);
    }
  },
};

/** An answer that says no, and that asking again would not change. */
export class Refused extends Error {
  constructor(status, code, message) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

let keyWanted = false;
const waiters = new Set(); // those who wait for a key, for the network, or for their turn

export const key = {
  get value() {
    return remembered.get(KEY) ?? "";
  },
  set value(text) {
    remembered.set(KEY, text === "" ? null : text);
    keyWanted = false;
    wakeAll();
  },
};

/** End all waits at once; who waits then tries again. */
export function wakeAll() {
  for (const wake of [...waiters]) wake();
}

/** Wait until the time is over (false) or somebody wakes all (true); throws if the signal aborts. */
export function pause(ms, signal) {
  return new Promise((resolve, reject) => {
    const end = (settle) => () => {
      clearTimeout(timer);
      waiters.delete(wake);
      signal?.removeEventListener("abort", abort);
      settle();
    };
    const wake = end(() => resolve(true));
    const over = end(() => resolve(false));
    const abort = end(() => reject(signal.reason));
    const timer = Number.isFinite(ms) ? setTimeout(over, Math.max(0, ms)) : undefined;
    waiters.add(wake);
    signal?.addEventListener("abort", abort);
    if (signal?.aborted) abort();
  });
}

/** Ask once; a network failure throws, any answer is returned with its body as JSON or null. */
export async function askOnce(path, { body, signal } = {}) {
  const headers = { accept: "application/json" };
  if (key.value) headers.authorization = `Bearer ${key.value}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  const limit = AbortSignal.timeout(body === undefined ? ASK_MS : SEND_MS);
  const response = await fetch(path, {
    method: body === undefined ? "GET" : "POST",
    headers,
    body: body === undefined ? undefined : JSON.stringify(body),
    cache: "no-store",
    credentials: "same-origin",
    redirect: "error", // the key goes to this service, and not where an answer points to
    signal: signal ? AbortSignal.any([signal, limit]) : limit,
  });
  const text = await response.text();
  client.dispatchEvent(new Event("reached"));
  let answer = null;
  try {
    answer = JSON.parse(text);
  } catch {
    // A proxy's page; the status says enough.
  }
  return { response, answer };
}

/**
 * Ask until there is an answer: waits for a key, for the network, and as long as a busy service
 * asks for. `onWait({kind, seconds, message})` hears each second of a wait, and `onWait(null)` its
 * end. Throws `Refused` for a no, and the signal's reason once that aborts.
 */
export async function ask(path, { body, signal, onWait = () => {} } = {}) {
  for (let failures = 0; ; failures += 1) {
    while (keyWanted) {
      onWait({ kind: "key" });
      await pause(Infinity, signal);
    }
    onWait(null);
    const used = key.value;
    let answered;
    try {
      answered = await askOnce(path, { body, signal });
    } catch (error) {
      if (signal?.aborted) throw error;
      client.dispatchEvent(new Event("unreachable"));
      await countDown(backoff(failures), signal, (seconds) => onWait({ kind: "offline", seconds }));
      continue;
    }
    const { response, answer } = answered;
    if (response.ok && answer !== null) return answer;
    const message = messageOf(response, answer);
    if (response.status === 401) {
      if (used === key.value) {
        keyWanted = true;
        client.dispatchEvent(new CustomEvent("key-wanted", { detail: used !== "" }));
      }
    } else if (BUSY.has(response.status)) {
      const seconds = retryAfter(response.headers.get("retry-after")) ?? backoff(failures);
      await countDown(seconds, signal, (left) => onWait({ kind: "busy", seconds: left, message }));
    } else {
      throw new Refused(response.status, answer?.error?.code ?? null, message);
    }
  }
}

async function countDown(seconds, signal, tell) {
  const end = performance.now() + seconds * 1000;
  for (let left = seconds; left > 0; left = (end - performance.now()) / 1000) {
    tell(Math.ceil(left));
    if (await pause(Math.min(left, 1) * 1000, signal)) return;
  }
}

/* 1, 2, 4 ... 30 seconds, each up to a quarter longer, so that tabs do not come back together. */
function backoff(failures) {
  return Math.min(30, 2 ** failures) * (1 + Math.random() / 4);
}

function retryAfter(value) {
  if (value === null) return null;
  const seconds = /^\s*\d+(\.\d+)?\s*$/.test(value)
    ? Number(value)
    : (Date.parse(value) - Date.now()) / 1000;
  return Number.isFinite(seconds) ? Math.min(LONGEST_WAIT_S, Math.max(0.2, seconds)) : null;
}

function messageOf(response, answer) {
  const said = answer?.error?.message;
  if (typeof said === "string" && said !== "") return said;
  if (response.ok) return "The answer of the service is not JSON.";
  return `The service answered with HTTP ${response.status}.`;
}
