/* The documents of this tab: sends them, follows their tasks, shows their rows. */

import { ask, pause, Refused, remembered } from "./client.js";
import { NotSendable } from "./intake.js";

const TASKS = "embedding-service.tasks";
const LANES = 3; // documents sent at the same time
const FIRST_POLL_MS = 250;
const LAST_POLL_MS = 5_000;

const STATES = {
  waiting: "Waiting",
  sending: "Sending",
  queued: "Queued",
  running: "Running",
  done: "Done",
  failed: "Failed",
  refused: "Not sent",
  lost: "Unknown",
};
const SENT = new Set(["queued", "running"]);
const ENDED = new Set(["done", "failed", "refused", "lost"]);

const list = document.getElementById("documents");
const template = document.getElementById("document-row");
const announcer = document.getElementById("announcer");
const entries = new Set();
const toSend = [];
let lanes = 0;
let polling = false;
let pollSooner = null;
let onDone = () => {};

/** Call back whenever a document is done. */
export function whenDone(callback) {
  onDone = callback;
}

/** Add sources on top of the list, in their order, and send them. */
export function add(sources) {
  const fragment = document.createDocumentFragment();
  for (const source of sources) {
    const entry = newEntry(source.title, source);
    fragment.append(entry.row);
    enqueue(entry);
  }
  list.prepend(fragment);
  summarise();
}

/** Follow the tasks that this tab had before it was loaded again. */
export function restore() {
  let kept = [];
  try {
    kept = JSON.parse(remembered.get(TASKS) ?? "[]");
  } catch {
    // Nobody's list but ours; without it there is nothing to follow.
  }
  for (const { taskId, title } of Array.isArray(kept) ? kept : []) {
    if (typeof taskId !== "string") continue;
    const entry = newEntry(String(title), null);
    entry.taskId = taskId;
    list.append(entry.row);
    show(entry, "queued", "Asking the service");
  }
  summarise();
  poll();
}

export function clearEnded() {
  for (const entry of [...entries]) if (ENDED.has(entry.state)) remove(entry);
}

export function hasUnsent() {
  return [...entries].some((entry) => entry.state === "waiting" || entry.state === "sending");
}

/** Ask for the progress of all open tasks now. */
export function pollNow() {
  for (const entry of entries) entry.dueAt = 0;
  pollSooner?.abort();
}

function newEntry(title, source) {
  const row = template.content.firstElementChild.cloneNode(true);
  const part = (name) => row.querySelector(name);
  const entry = {
    title, source, row, taskId: null, state: "waiting", detail: "", chunks: "",
    dueAt: 0, delay: FIRST_POLL_MS, left: new AbortController(),
    parts: {
      title: part(".document-title"), badge: part(".badge"), detail: part(".document-detail"),
      bar: part("progress"), again: part(".again"), remove: part(".remove"),
    },
  };
  entries.add(entry);
  entry.parts.again.addEventListener("click", () => enqueue(entry));
  entry.parts.remove.addEventListener("click", () => {
    const neighbour = row.nextElementSibling ?? row.previousElementSibling;
    remove(entry);
    (neighbour?.querySelector(".remove") ?? document.getElementById("files")).focus();
  });
  return entry;
}

function remove(entry) {
  entry.left.abort();
  entries.delete(entry);
  entry.row.remove();
  keep();
  summarise();
}

// --- Sending ----------------------------------------------------------------------------------

function enqueue(entry) {
  entry.taskId = null;
  try {
    entry.source.check();
  } catch (error) {
    return show(entry, "refused", error.message);
  }
  show(entry, "waiting", "");
  toSend.push(entry);
  if (lanes < LANES) lane();
}

async function lane() {
  lanes += 1;
  try {
    while (toSend.length > 0) await send(toSend.shift());
  } finally {
    lanes -= 1;
  }
}

async function send(entry) {
  const { source, left } = entry;
  if (left.signal.aborted) return;
  try {
    const body = await source.body();
    // Content decides the id, so a document that is sent twice is still stored once.
    const task = await ask("documents", {
      body,
      signal: left.signal,
      onWait: (wait) => show(entry, wait ? "waiting" : "sending", waitText(wait)),
    });
    if (left.signal.aborted) return;
    entry.taskId = String(task.task_id);
    entry.delay = FIRST_POLL_MS;
    entry.dueAt = performance.now() + FIRST_POLL_MS;
    show(entry, "queued", "");
    keep();
    poll();
  } catch (error) {
    if (left.signal.aborted) return;
    const never = error instanceof NotSendable;
    if (!never && !(error instanceof Refused)) console.error(error);
    show(entry, never ? "refused" : "failed", reasonOf(error));
  }
}

function waitText(wait) {
  if (!wait) return "";
  if (wait.kind === "key") return "Goes on when an API key is entered.";
  if (wait.kind === "offline") return `No connection. Next try in ${wait.seconds} s.`;
  return `${wait.message} Next try in ${wait.seconds} s.`;
}

function reasonOf(error) {
  if (error.status === 413) return `Too large for the service: ${error.message}`;
  return error.message;
}

// --- Following --------------------------------------------------------------------------------

async function poll() {
  pollSooner?.abort();
  if (polling) return;
  polling = true;
  try {
    // One request at a time, the task that is due first: many tasks do not become a flood.
    for (;;) {
      const open = [...entries].filter((entry) => entry.taskId && SENT.has(entry.state));
      if (open.length === 0) return;
      const next = open.reduce((a, b) => (b.dueAt < a.dueAt ? b : a));
      const wait = next.dueAt - performance.now();
      if (wait <= 0) {
        await follow(next);
        continue;
      }
      pollSooner = new AbortController();
      await pause(wait, pollSooner.signal).catch(() => {});
    }
  } finally {
    polling = false;
  }
}

async function follow(entry) {
  const { signal } = entry.left;
  try {
    const task = await ask(`tasks/${encodeURIComponent(entry.taskId)}`, {
      signal,
      onWait: (wait) => {
        if (wait?.kind === "busy") show(entry, entry.state, waitText(wait));
      },
    });
    if (!signal.aborted) update(entry, task);
  } catch (error) {
    if (signal.aborted) return;
    if (error instanceof Refused && error.status < 500) {
      const gone = "The service does not know this task (any more). Add the document again.";
      show(entry, "lost", error.status === 404 ? gone : error.message);
    } else {
      if (!(error instanceof Refused)) console.error(error);
      show(entry, entry.state, error.message);
    }
  }
  entry.delay = Math.min(LAST_POLL_MS, entry.delay * 1.5);
  entry.dueAt = performance.now() + entry.delay;
}

function update(entry, task) {
  const total = Number(task.chunks_total) || 0;
  const done = Math.min(Number(task.chunks_done) || 0, total);
  const state = task.status in STATES ? task.status : "queued";
  if (state !== entry.state || entry.chunks !== `${done}/${total}`) entry.delay = FIRST_POLL_MS;
  entry.chunks = `${done}/${total}`;
  if (typeof task.title === "string" && task.title !== "") entry.title = task.title;
  const many = `${total} ${total === 1 ? "chunk" : "chunks"}`;
  const details = {
    queued: "",
    running: total ? `${done} of ${many}` : "Being split",
    done: many,
    failed: task.error?.message || "The service gave no reason.",
  };
  show(entry, state, details[state], { done, total });
  if (state === "done") onDone();
}

// --- Showing ----------------------------------------------------------------------------------

function show(entry, state, detail, progress = null) {
  const { parts } = entry;
  const changed = entry.state !== state;
  entry.state = state;
  entry.row.dataset.state = state;
  parts.title.textContent = entry.title;
  parts.title.title = entry.title;
  parts.badge.textContent = STATES[state];
  parts.detail.textContent = detail;
  parts.remove.setAttribute("aria-label", `Remove ${entry.title} from this list`);
  parts.again.setAttribute("aria-label", `Try ${entry.title} again`);
  parts.again.hidden = !(entry.source && (state === "failed" || state === "lost"));
  parts.bar.hidden = state !== "running";
  parts.bar.setAttribute("aria-label", `Progress of ${entry.title}`);
  if (progress?.total) {
    parts.bar.max = progress.total;
    parts.bar.value = progress.done;
  } else if (changed) {
    parts.bar.removeAttribute("value");
  }
  if (changed && state !== "waiting" && state !== "sending") {
    announcer.textContent = `${entry.title}: ${STATES[state]}. ${ENDED.has(state) ? detail : ""}`;
  }
  if (changed) summarise();
}

function summarise() {
  const all = [...entries];
  const count = (...states) => all.filter((entry) => states.includes(entry.state)).length;
  const bad = count("failed", "refused", "lost");
  document.getElementById("summary").textContent = all.length
    ? `${count("done")} of ${all.length} done${bad ? `, ${bad} not stored` : ""}`
    : "";
  document.getElementById("nothing-yet").hidden = all.length > 0;
  document.getElementById("clear").hidden = !all.some((entry) => ENDED.has(entry.state));
}

function keep() {
  const inOrder = [...list.children].map((row) => [...entries].find((one) => one.row === row));
  const sent = inOrder.filter((entry) => entry?.taskId);
  const kept = sent.map(({ taskId, title }) => ({ taskId, title }));
  remembered.set(TASKS, kept.length ? JSON.stringify(kept) : null);
}
