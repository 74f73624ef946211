/* What may be sent: UTF-8 text that is neither empty nor too large. Nothing else leaves the page. */

// Must match the service's defaults: `max_body_bytes` (of which `/healthz` may name another value),
// and the longest title.
export const limits = { bytes: 1_048_576 };
const MAX_TITLE_CHARS = 200;

/** Why a text or file is not sent; the message is for the user. */
export class NotSendable extends Error {}

/** A source is read when its turn comes, so that a thousand files do not fill the memory. */
export function fromFile(file) {
  return {
    title: titleOf(file.name),
    check: () => checkSize(file.size),
    body: async () => {
      let bytes;
      try {
        bytes = await file.arrayBuffer();
      } catch {
        throw new NotSendable("It could not be read. Is it a folder, or was it changed or moved?");
      }
      return checkedBody(decode(bytes), file.name, { source: "file" });
    },
  };
}

export function fromText(text, title) {
  const named = titleOf(title.trim() || text.trim().split("\n", 1)[0].slice(0, 80));
  return {
    title: named,
    check: () => checkedBody(text, named, { source: "paste" }),
    body: async () => checkedBody(text, named, { source: "paste" }),
  };
}

export function readableSize(bytes) {
  const units = ["bytes", "KiB", "MiB", "GiB"];
  let power = 0;
  while (bytes >= 1024 ** (power + 1) && power < units.length - 1) power += 1;
  const number = bytes / 1024 ** power;
  return `${number.toLocaleString("en", { maximumFractionDigits: power ? 1 : 0 })} ${units[power]}`;
}

function checkedBody(text, title, metadata) {
  if (text.includes("\0")) throw new NotSendable("It holds binary data, not text.");
  if (text.trim() === "") throw new NotSendable("It is empty.");
  const body = { text, title: titleOf(title), metadata };
  // What counts is the request, in which each line break takes two bytes.
  checkSize(new TextEncoder().encode(JSON.stringify(body)).length);
  return body;
}

/* In whole characters, since half of one is refused. */
function titleOf(text) {
  return [...text.replace(/\p{Surrogate}/gu, "\ufffd")].slice(0, MAX_TITLE_CHARS).join("");
}

function checkSize(bytes) {
  if (bytes <= limits.bytes) return;
  const [is, most] = [readableSize(bytes), readableSize(limits.bytes)];
  const said = is === most ? `${bytes.toLocaleString("en")} bytes` : is;
  throw new NotSendable(`Too large: ${said} to send, and the service takes at most ${most}.`);
}

function decode(bytes) {
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch {
    throw new NotSendable("It is not UTF-8 text. Save it as UTF-8, then add it again.");
  }
}
