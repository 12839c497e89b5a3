// The page: shows a screen, takes what the labeler says of it, sends it, and goes on.

import { RankingList, fromRanks, place, step, tie, toRanks, unranked } from "/static/ranking.js";
import { excerpt, fill } from "/static/text.js";
import { Unsent, post } from "/static/unsent.js";

const $ = id => document.getElementById(id);
const LETTERS = "ABCDEFGHI";
const TASKS = {
  rank: "Rate each response, then rank them all", pairs: "Which response is better?", write: "Write the best response",
  done: "No screen is left for you. Thank you!",
  refused: "Thank you for your time. Your answers differ too often from the known ones, so there are no further screens for you.",
};
const RETRY = [1000, 2000, 4000, 8000]; // milliseconds until the server is asked again

const { database, labeler } = document.body.dataset;
function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

function pause(milliseconds) {
  return new Promise(resolve => {
    const timer = setTimeout(resolve, milliseconds);
    addEventListener("online", () => { clearTimeout(timer); resolve(); }, { once: true });
  });
}

class Page {
  constructor() {
    this.unsent = new Unsent(database, labeler);
    this.shown = null; // the screen, as the server gave it
    this.draft = null; // { ranking, likert, flags, text, seconds } of it
    this.current = 0; // the response that keys are for
    this.list = new RankingList($("rows"), $("tray"), $("chip"), {
      changed: ranking => this.rank(ranking), chosen: i => this.choose(i, true),
    });
    this.clock = performance.now();
  }

  // ---- from screen to screen

  // Sends what is unsent, then shows a screen: the next one, or an earlier one to correct.
  async go(earlier = null) {
    if (this.going) return;
    this.going = true;
    this.keep();
    $("screen").inert = true;
    try {
      for (let tries = 0; ; tries++) {
        const sent = await this.unsent.send();
        const answer = sent === "waiting" ? { status: 0 } : await post(earlier ? "/earlier" : "/next", { database, labeler, screen: earlier });
        if (answer.status === 200) {
          notice(sent === "sent" ? "" : sent);
          this.show(answer.value);
          return;
        }
        if (answer.status !== 0 && answer.status < 500) { notice(sent === "sent" ? `${answer.value.error}.` : sent); return; }
        const count = this.unsent.count();
        const kept = count ? ` ${count === 1 ? "1 screen is" : `${count} screens are`} kept in this browser and will be sent when it answers.` : "";
        notice(`The server does not answer.${kept}`);
        await pause(RETRY[Math.min(tries, RETRY.length - 1)]);
      }
    } finally {
      this.going = false;
      $("screen").inert = !this.draft && this.shown?.state === "screen"; // sent, and nothing came
      $("back").disabled = !this.shown?.previous;
      $("submit").disabled = !this.draft;
      if (this.draft && this.shown.kind === "write") $("text").focus();
    }
  }

  show(shown) {
    this.shown = shown;
    const { kind } = shown;
    $("progress").textContent = `${shown.done} done${shown.left ? `, ${shown.left} left for you` : ""}`;
    document.body.dataset.kind = kind ?? "none";
    $("screen").hidden = false;
    $("correcting").hidden = !shown.answer;
    $("writing").hidden = kind !== "write";
    if (shown.state !== "screen") {
      $("task").textContent = TASKS[shown.state];
      $("prompt").replaceChildren();
      $("responses").replaceChildren();
      $("missing").textContent = "";
      $("submit").hidden = true;
      $("back").hidden = shown.previous === null;
      this.draft = null;
      return;
    }
    $("submit").hidden = $("back").hidden = false;
    $("task").textContent = TASKS[kind] + (shown.screening ? " (a trial, with known answers)" : "");
    const { answer, responses: { length: count } } = shown;
    this.draft = this.unsent.draft(shown.screen) ?? {
      ranking: answer?.ranks ? fromRanks(answer.ranks) : unranked(count),
      likert: answer?.likert ?? Array(count).fill(null),
      flags: answer?.flags ?? Array.from({ length: count }, () => []),
      text: answer?.text ?? "",
      seconds: 0,
    };
    this.clock = performance.now();
    $("prompt").replaceChildren(...shown.turns.map(([role, text]) => {
      const turn = document.createElement("div"), name = document.createElement("b"), said = document.createElement("div");
      turn.className = "turn";
      name.textContent = role;
      said.dir = "auto";
      said.tabIndex = 0;
      fill(said, text);
      turn.append(name, said);
      return turn;
    }));
    $("responses").replaceChildren(...shown.responses.map((text, i) => this.card(text, i)));
    $("text").value = this.draft.text;
    this.changed();
    this.choose(0, false);
    scrollTo(0, 0);
  }

  card(text, i) {
    const card = $("card").content.cloneNode(true).querySelector(".card");
    card.setAttribute("aria-label", `Response ${LETTERS[i]}`);
    card.querySelector(".letter").textContent = LETTERS[i];
    fill(card.querySelector(".text"), text);
    card.querySelector(".flags").open = matchMedia("(min-width: 46rem)").matches;
    for (const input of card.querySelectorAll(".likert input")) {
      input.name = `likert-${i}`;
      input.addEventListener("change", () => { this.draft.likert[i] = Number(input.value); this.changed(); });
    }
    for (const input of card.querySelectorAll(".flags input")) {
      input.addEventListener("change", () => this.flag(i, input.value, input.checked));
    }
    card.addEventListener("focusin", () => this.choose(i, false));
    card.addEventListener("pointerdown", () => this.choose(i, false));
    return card;
  }

  // ---- what the labeler says

  flag(i, name, raised) {
    const others = this.draft.flags[i].filter(x => x !== name);
    this.draft.flags[i] = raised ? [...others, name] : others;
    this.changed();
  }

  // Shows the draft, and keeps it.
  changed() {
    const { ranking, likert, flags } = this.draft, { kind, responses } = this.shown;
    const ranks = toRanks(ranking, responses.length);
    const cards = [...document.querySelectorAll(".card")];
    for (const [i, card] of cards.entries()) {
      for (const input of card.querySelectorAll(".likert input")) input.checked = Number(input.value) === likert[i];
      const names = [...card.querySelectorAll(".flags input")].map(input => {
        input.checked = flags[i].includes(input.value);
        return input.checked;
      });
      const raised = names.filter(Boolean).length;
      card.querySelector(".raised").textContent = raised || "none";
      const tied = ranks.flatMap((r, j) => (j !== i && r !== null && r === ranks[i] ? [LETTERS[j]] : []));
      const where = ranks[i] === null ? "not ranked yet" : `rank ${ranks[i]}${tied.length ? `, tied with ${tied.join(", ")}` : ""}`;
      card.querySelector(".place").textContent = kind === "rank" ? where : "";
    }
    for (const button of document.querySelectorAll("#choice button")) {
      button.setAttribute("aria-pressed", String(button.dataset.ranks === ranks.join(" ")));
    }
    this.list.show(ranking, responses.map(excerpt), LETTERS);
    this.mark();
    if (this.complained) notice("");
    this.complained = false;
    $("missing").textContent = this.missing().text;
    this.keep();
  }

  // What is not said yet: { text, first: the first response that lacks something }.
  missing() {
    const { ranking, likert } = this.draft, { kind } = this.shown;
    const unrated = kind === "rank" ? likert.flatMap((x, i) => (x === null ? [i] : [])) : [];
    if (kind === "write") return $("text").value.trim() ? { text: "" } : { text: "Nothing is written yet." };
    const letters = list => [...list].sort((a, b) => a - b).map(i => LETTERS[i]).join(", ");
    if (kind === "pairs") return { text: ranking.tray.length ? "Choose one of the three." : "" };
    const parts = [];
    if (unrated.length) parts.push(`no rating: ${letters(unrated)}`);
    if (ranking.tray.length) parts.push(`no rank: ${letters(ranking.tray)}`);
    const text = parts.join("; ");
    return { text: text && `${text[0].toUpperCase()}${text.slice(1)}`, first: Math.min(...unrated, ...ranking.tray) };
  }

  // Adds up the seconds for which the page was seen, and keeps the draft.
  keep(seen = !document.hidden) {
    const now = performance.now();
    if (this.draft) {
      this.draft.seconds += seen ? (now - this.clock) / 1000 : 0;
      this.draft.text = $("text").value;
      if (!this.unsent.keepDraft(this.shown.screen, this.draft)) {
        notice("This browser keeps nothing: if the page is closed before it has sent a screen, that screen is lost.");
      }
    }
    this.clock = now;
  }

  submit() {
    if (!this.draft || this.going) return;
    const { text, first } = this.missing();
    if (text) {
      notice(text);
      this.complained = true;
      if (first !== undefined && Number.isFinite(first)) this.choose(first, true);
      return;
    }
    this.keep();
    const { ranking, likert, flags, seconds } = this.draft, { kind, screen, responses } = this.shown;
    const label = { seconds };
    if (kind === "write") label.text = $("text").value;
    else label.ranks = toRanks(ranking, responses.length);
    if (kind === "rank") Object.assign(label, { likert, flags });
    this.unsent.add(screen, label);
    this.draft = null;
    this.go();
  }

  // ---- which response keys are for

  choose(i, scroll) {
    const cards = [...document.querySelectorAll(".card")];
    if (i < 0 || i >= cards.length) return;
    this.current = i;
    this.mark();
    if (scroll) {
      cards[i].focus({ preventScroll: true });
      cards[i].scrollIntoView({ block: "nearest" });
    }
  }

  mark() {
    for (const [i, card] of [...document.querySelectorAll(".card")].entries()) card.classList.toggle("current", i === this.current && this.shown.kind === "rank");
    for (const chip of document.querySelectorAll(".chip")) chip.classList.toggle("current", Number(chip.dataset.response) === this.current);
  }

  rank(ranking) { this.draft.ranking = ranking; this.changed(); }
  key(event) {
    const typing = event.target.matches("textarea, input:not([type=radio], [type=checkbox])");
    if (event.key === "Enter" && (typing ? event.ctrlKey || event.metaKey : !event.target.closest("button, summary, a"))) {
      this.submit();
      return true;
    }
    if (typing || event.ctrlKey || event.metaKey) return false;
    if (event.key === "u" && !event.altKey) { if (this.shown?.previous) this.go(this.shown.previous); return true; }
    if (!this.draft || this.going) return false;
    const { kind } = this.shown, { ranking } = this.draft, i = this.current;
    const digit = /^(?:Digit|Numpad)([1-9])$/.exec(event.code)?.[1];
    if (kind === "pairs" && (["1", "2", "="].includes(event.key))) {
      this.rank(fromRanks({ 1: [1, 2], 2: [2, 1], "=": [1, 1] }[event.key]));
      return true;
    }
    if (kind !== "rank") return false;
    if (event.altKey) {
      const direction = { ArrowUp: -1, ArrowDown: 1 }[event.key];
      if (direction) this.rank(step(ranking, i, direction));
      return Boolean(direction);
    }
    if (event.key === "=") this.rank(tie(ranking, i));
    else if (digit && event.shiftKey) this.rank(place(ranking, i, Number(digit)));
    else if (/^[1-7]$/.test(event.key)) { this.draft.likert[i] = Number(event.key); this.changed(); }
    else if (event.key === "j") this.choose(i + 1, true);
    else if (event.key === "k") this.choose(i - 1, true);
    else {
      const input = /^[a-z]$/.test(event.key) && document.querySelectorAll(".card")[i].querySelector(`[data-key="${event.key}"]`);
      if (input) this.flag(i, input.value, !input.checked);
      return Boolean(input);
    }
    return true;
  }

  begin() {
    document.addEventListener("keydown", event => { if (this.key(event)) event.preventDefault(); });
    document.addEventListener("visibilitychange", () => this.keep(document.hidden));
    addEventListener("pagehide", () => this.keep());
    $("text").addEventListener("input", () => this.changed());
    $("submit").addEventListener("click", () => this.submit());
    $("back").addEventListener("click", () => this.go(this.shown.previous));
    $("forward").addEventListener("click", () => { this.draft = null; this.unsent.dropDraft(this.shown.screen); this.go(); });
    for (const button of document.querySelectorAll("#choice button")) {
      button.addEventListener("click", () => this.rank(fromRanks(button.dataset.ranks.split(" ").map(Number))));
    }
    $("leave").addEventListener("click", async () => {
      this.keep();
      if ((await post("/leave", {})).status === 200) location.reload();
    });
    this.go();
  }
}

if (labeler) new Page().begin();
else {
  $("enter").addEventListener("submit", async event => {
    event.preventDefault();
    const { status, value } = await post("/enter", { name: $("name").value });
    if (status === 200) location.reload();
    else notice(status ? `${value.error}.` : "The server does not answer.");
  });
}
