/* Puts the page together: the key, the state of the service, what is dropped, chosen or pasted. */

import { askOnce, client, key, wakeAll } from "./client.js";
import { add, clearEnded, hasUnsent, pollNow, restore, whenDone } from "./documents.js";
import { fromFile, fromText, limits, readableSize } from "./intake.js";
import { search } from "./search.js";

const HEALTH_MS = 30_000; // between two looks at a service that is well
const FIRST_RETRY_MS = 2_000;
const at = (id) => document.getElementById(id);

// --- The banner: what keeps everything waiting ------------------------------------------------

function showBanner(kind, text, action, act) {
  at("banner").dataset.kind = kind;
  at("banner").hidden = false;
  // Said once, however often it is found out.
  if (at("banner-text").textContent !== text) at("banner-text").textContent = text;
  at("banner-action").textContent = action;
  at("banner-action").onclick = act;
}

function hideBanner(kind) {
  if (at("banner").dataset.kind !== kind) return;
  at("banner").hidden = true;
  at("banner").dataset.kind = "";
  at("banner-text").textContent = "";
}

client.addEventListener("unreachable", () => {
  showHealth("offline", "Unreachable");
  if (at("banner").dataset.kind === "key") return; // it stays when the connection is back
  const text = "The service cannot be reached. Everything goes on by itself once it can.";
  showBanner("offline", text, "Try now", tryNow);
});
client.addEventListener("reached", () => {
  if (at("banner").dataset.kind !== "offline") return;
  hideBanner("offline");
  tryNow();
});
client.addEventListener("key-wanted", ({ detail: refused }) => {
  const why = refused ? "does not accept this API key" : "asks for an API key";
  const text = `The service ${why}. Everything goes on once one is entered.`;
  showBanner("key", text, "Enter key", focusKey);
  at("key-panel").open = true;
  showKey(refused ? "refused" : "needed");
  // Nobody is taken away from what they are typing.
  if (document.activeElement === document.body) focusKey();
});
window.addEventListener("online", tryNow);

function tryNow() {
  wakeAll();
  checkHealth();
}

// --- The key ----------------------------------------------------------------------------------

function focusKey() {
  at("key-panel").open = true;
  at("key").focus();
}

function showKey(note = key.value ? "set" : "not set") {
  at("key-note").textContent = note;
  at("key-note").dataset.note = note;
  at("key-forget").disabled = key.value === "";
}

at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const value = at("key").value.trim();
  // What cannot stand in a header is no key.
  const usable = /^[\x21-\x7e]+$/.test(value);
  at("key").setAttribute("aria-invalid", String(!usable));
  at("key-problem").textContent = usable
    ? ""
    : value === "" ? "Enter a key first." : "A key has only plain letters, digits and signs.";
  if (!usable) return;
  at("key").value = "";
  at("key-panel").open = false;
  hideBanner("key");
  key.value = value;
  showKey();
  checkHealth();
});
at("key-panel").addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  at("key-panel").open = false;
  at("key-panel").querySelector("summary").focus();
});
at("key-forget").addEventListener("click", () => {
  at("key").value = "";
  key.value = "";
  showKey();
});

// --- The state of the service -----------------------------------------------------------------

let healthTimer = null;
let healthAsked = 0;
let offlineMs = FIRST_RETRY_MS;

function showHealth(state, text) {
  at("health-state").dataset.state = state;
  if (at("health-text").textContent !== text) at("health-text").textContent = text;
}

async function checkHealth() {
  clearTimeout(healthTimer);
  const mine = (healthAsked += 1);
  let next = HEALTH_MS;
  try {
    const { response, answer } = await askOnce("healthz");
    if (mine !== healthAsked) return;
    offlineMs = FIRST_RETRY_MS;
    const good = response.ok && answer?.status === "ok";
    const trouble = answer?.error?.message ?? `HTTP ${response.status}`;
    showHealth(good ? "ok" : "bad", good ? "Ready" : `Not ready: ${trouble}`);
    for (const fact of ["model", "store", "queue", "documents", "chunks"]) {
      at(`fact-${fact}`).textContent = wordOf(answer?.[fact]);
    }
    showLimit(answer?.max_body_bytes);
  } catch {
    if (mine !== healthAsked) return;
    next = offlineMs;
    offlineMs = Math.min(HEALTH_MS, 2 * offlineMs);
    client.dispatchEvent(new Event("unreachable"));
  }
  healthTimer = setTimeout(() => !document.hidden && checkHealth(), next);
}

function wordOf(value) {
  if (typeof value === "number") return value.toLocaleString("en");
  return typeof value === "string" && value !== "" ? value : "–";
}

function showLimit(bytes) {
  if (Number.isInteger(bytes) && bytes > 0) limits.bytes = bytes;
  at("size-limit").textContent = ` up to ${readableSize(limits.bytes)}`;
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden) return;
  checkHealth();
  pollNow();
});

// --- What comes in ----------------------------------------------------------------------------

at("files").addEventListener("change", () => {
  add([...at("files").files].map(fromFile));
  at("files").value = ""; // the same file can be chosen again
});

const carriesFiles = (event) => event.dataTransfer?.types.includes("Files") ?? false;
let depth = 0; // `dragleave` also comes when only a child is left

// The whole page takes a drop: beside the frame the browser would open the file and leave.
document.addEventListener("dragenter", (event) => {
  if (!carriesFiles(event)) return;
  depth += 1;
  at("drop").classList.add("over");
});
document.addEventListener("dragleave", (event) => {
  if (!carriesFiles(event)) return;
  depth = Math.max(0, depth - 1);
  if (depth === 0) at("drop").classList.remove("over");
});
document.addEventListener("dragover", (event) => {
  if (!carriesFiles(event)) return;
  event.preventDefault();
  event.dataTransfer.dropEffect = "copy";
});
document.addEventListener("drop", (event) => {
  if (!carriesFiles(event)) return;
  event.preventDefault();
  depth = 0;
  at("drop").classList.remove("over");
  add([...event.dataTransfer.files].map(fromFile));
});

at("paste-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const source = fromText(at("paste-text").value, at("paste-title").value);
  try {
    source.check();
  } catch (error) {
    at("paste-problem").textContent = error.message;
    at("paste-text").setAttribute("aria-invalid", "true");
    at("paste-text").focus();
    return;
  }
  at("paste-problem").textContent = "";
  at("paste-text").removeAttribute("aria-invalid");
  at("paste-form").reset();
  add([source]);
});

at("clear").addEventListener("click", () => {
  clearEnded();
  at("files").focus();
});
at("search-form").addEventListener("submit", (event) => {
  event.preventDefault();
  search(at("query").value, at("count").value);
});
window.addEventListener("beforeunload", (event) => {
  if (hasUnsent()) event.preventDefault();
});

whenDone(() => {
  // Once for many that are done together.
  clearTimeout(healthTimer);
  healthTimer = setTimeout(checkHealth, 300);
});
showKey();
showLimit(null);
checkHealth();
restore();
