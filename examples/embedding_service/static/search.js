/* The search: one question at a time, its results as text with the words of the question marked. */

import { ask, Refused } from "./client.js";

const SHORT = 700; // characters of a chunk that are shown at first

const status = document.getElementById("search-status");
const results = document.getElementById("results");
const template = document.getElementById("result-row");
let current = null;

/** Search; a newer search ends an older one. */
export async function search(query, count) {
  current?.abort();
  const { signal } = (current = new AbortController());
  status.classList.remove("problem");
  if (query.trim() === "") {
    results.replaceChildren();
    status.textContent = "Enter what to search for.";
    return;
  }
  try {
    results.setAttribute("aria-busy", "true");
    const answer = await ask(`search?${new URLSearchParams({ q: query, k: count })}`, {
      signal,
      onWait: (wait) => {
        // Answers to an older question do not stand under a wait of unknown length.
        if (wait) results.replaceChildren();
        status.textContent = waitText(wait);
      },
    });
    if (signal.aborted) return;
    const found = Array.isArray(answer.results) ? answer.results : [];
    const words = wordsOf(query);
    results.replaceChildren(...found.map((result) => rowOf(result, words)));
    const many = found.length === 1 ? "1 result" : `${found.length} results`;
    status.textContent = found.length ? `${many} for “${query}”` : `Nothing found for “${query}”.`;
  } catch (error) {
    if (signal.aborted) return;
    if (!(error instanceof Refused)) console.error(error);
    results.replaceChildren();
    status.classList.add("problem");
    status.textContent = `The search failed: ${error.message}`;
  } finally {
    if (!signal.aborted) results.removeAttribute("aria-busy");
  }
}

function waitText(wait) {
  if (!wait) return "Searching";
  if (wait.kind === "key") return "The search goes on when an API key is entered.";
  if (wait.kind === "offline") return "No connection. The search goes on by itself.";
  return `${wait.message} The search goes on in ${wait.seconds} s.`;
}

function rowOf(result, words) {
  const row = template.content.firstElementChild.cloneNode(true);
  const part = (name) => row.querySelector(name);
  const text = String(result.text ?? "");
  part(".result-title").textContent = result.title || result.document_id || "Untitled";
  part(".score").textContent = Number.isFinite(result.score) ? `Score ${result.score.toFixed(3)}` : "";
  part(".result-chunk").textContent = Number.isFinite(result.chunk) ? `Chunk ${result.chunk + 1}` : "";
  const body = part(".result-text");
  body.replaceChildren(...marked(excerpt(text, words), words));
  const whole = part(".whole");
  whole.hidden = text.length <= SHORT;
  whole.addEventListener("click", () => {
    body.replaceChildren(...marked(text, words));
    whole.remove();
  });
  return row;
}

/* From a little before the first marked word, where the text is long. */
function excerpt(text, words) {
  if (text.length <= SHORT) return text;
  const first = words ? Math.max(0, text.search(words)) : 0;
  let from = Math.min(Math.max(0, first - 80), text.length - SHORT);
  if (from > 0) from = text.indexOf(" ", from) + 1 || from;
  let until = from + SHORT;
  if (until < text.length) until = Math.max(text.lastIndexOf(" ", until), from + SHORT / 2);
  return `${from > 0 ? "… " : ""}${text.slice(from, until)}${until < text.length ? " …" : ""}`;
}

/* Letters and digits only, so the query needs no escaping; whole beginnings of words. */
function wordsOf(query) {
  const words = query.match(/[\p{L}\p{N}]+/gu);
  if (!words) return null;
  const longestFirst = [...new Set(words)].sort((a, b) => b.length - a.length);
  return new RegExp(`(?<![\\p{L}\\p{N}])(?:${longestFirst.join("|")})`, "giu");
}

/* Text nodes and <mark> elements: what stands in a document never becomes markup. */
function marked(text, words) {
  const nodes = [];
  let end = 0;
  for (const hit of words ? text.matchAll(words) : []) {
    const mark = document.createElement("mark");
    mark.textContent = hit[0];
    nodes.push(text.slice(end, hit.index), mark);
    end = hit.index + hit[0].length;
  }
  return [...nodes, text.slice(end)];
}
