// What a labeler has done and the server does not have yet: drafts, and labels to send.
//
// Both are kept in localStorage, each under a key of its own, so that two tabs never write over one
// another. A label has an id drawn here. The server keeps an id once, so that a label may be sent
// again whenever no answer came.

const memory = new Map(); // what localStorage had no room for

const PATIENCE = 20_000; // milliseconds for an answer

function read(key) {
  try { return localStorage.getItem(key) ?? memory.get(key) ?? null; } catch { return memory.get(key) ?? null; }
}

function write(key, text) {
  try { localStorage.setItem(key, text); memory.delete(key); return true; } catch { memory.set(key, text); return false; }
}

function remove(key) {
  memory.delete(key);
  try { localStorage.removeItem(key); } catch { /* it was in memory alone */ }
}

function keys(prefix) {
  const found = new Set(memory.keys());
  try { for (let i = 0; i < localStorage.length; i++) found.add(localStorage.key(i)); } catch { /* none */ }
  return [...found].filter(key => key.startsWith(prefix)).sort();
}

// Not crypto.randomUUID, which is there on loopback and under TLS alone.
function drawId() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map(x => x.toString(16).padStart(2, "0")).join("");
}

// An answer to a request, or a failure of it: `status` 0 means that no server answered.
export async function post(path, body) {
  let answer;
  try {
    answer = await fetch(path, {
      method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body),
      signal: AbortSignal.timeout(PATIENCE),
    });
  } catch { return { status: 0 }; }
  try { return { status: answer.status, value: await answer.json() }; } catch { return { status: 0 }; }
}

export class Unsent {
  constructor(database, labeler) {
    this.prefix = `instructjax/${database}/${encodeURIComponent(labeler)}/`;
    this.who = { database, labeler };
    this.sending = null;
  }

  draft(screen) { return JSON.parse(read(`${this.prefix}draft/${screen}`) ?? "null"); }

  // Whether the draft will be there after the page is closed.
  keepDraft(screen, draft) { return write(`${this.prefix}draft/${screen}`, JSON.stringify(draft)); }

  dropDraft(screen) { remove(`${this.prefix}draft/${screen}`); }

  // The label takes the draft's place. Keys sort by time: labels are sent in the order of their making.
  add(screen, label) {
    const time = String(Date.now()).padStart(15, "0"), id = drawId();
    const kept = write(`${this.prefix}label/${time}/${id}`, JSON.stringify({ ...label, id, screen, ...this.who }));
    this.dropDraft(screen);
    return kept;
  }

  count() { return keys(`${this.prefix}label/`).length; }

  // Sends all labels. Returns "sent", "waiting" (no server answered), or what the server says
  // against one, which is then kept apart.
  send() {
    this.sending ??= this.sendAll().finally(() => { this.sending = null; });
    return this.sending;
  }

  async sendAll() {
    for (const key of keys(`${this.prefix}label/`)) {
      const text = read(key);
      if (text === null) continue; // another tab has sent it
      const { status, value } = await post("/labels", JSON.parse(text));
      if (status === 200) remove(key);
      else if (status === 404 || status === 422 || status === 413) {
        write(key.replace("/label/", "/refused/"), text);
        remove(key);
        return `The server did not take a label: ${value.error}.`;
      } else if (status === 0 || status >= 500) return "waiting";
      else return `Not sent: ${value.error}. It is kept in this browser.`;
    }
    return "sent";
  }
}
