// The ranking of some responses: its moves, and a list in which they are dragged.
//
// A ranking is { rows, tray }: rows of numbers of responses, the best row first and tied responses in
// one row, and the numbers that have no place yet.

export function unranked(count) { return { rows: [], tray: [...Array(count).keys()] }; }

// ranks[i]: 1 for the best, and equal for ties.
export function fromRanks(ranks) {
  const places = [...new Set(ranks)].sort((a, b) => a - b);
  return { rows: places.map(p => ranks.flatMap((r, i) => (r === p ? [i] : []))), tray: [] };
}

export function toRanks({ rows }, count) {
  const ranks = Array(count).fill(null);
  for (const [r, row] of rows.entries()) for (const i of row) ranks[i] = r + 1;
  return ranks;
}

function rowOf({ rows }, i) { return rows.findIndex(row => row.includes(i)); }

function without({ rows, tray }, i) {
  return {
    rows: rows.map(row => row.filter(x => x !== i)), // an emptied row keeps the others' numbers
    tray: tray.filter(x => x !== i),
  };
}

function tidy({ rows, tray }) { return { rows: rows.filter(row => row.length), tray }; }

// Ties response i with those of a row.
export function join(ranking, i, row) {
  const { rows, tray } = without(ranking, i);
  rows[row] = [...rows[row], i].sort((a, b) => a - b);
  return tidy({ rows, tray });
}

// Puts response i between two rows: before the row of this number.
export function insert(ranking, i, row) {
  const { rows, tray } = without(ranking, i);
  rows.splice(row, 0, [i]);
  return tidy({ rows, tray });
}

// Puts response i alone at a place, 1 the best, as far as there are so many rows.
export function place(ranking, i, n) {
  const { rows, tray } = tidy(without(ranking, i));
  return insert({ rows, tray }, i, Math.min(n - 1, rows.length));
}

// Up (-1) or down (+1) by a row; out of a tie first; from the tray to the end.
export function step(ranking, i, direction) {
  const row = rowOf(ranking, i), { rows } = ranking;
  if (row < 0) return insert(ranking, i, rows.length);
  if (rows[row].length > 1) return insert(ranking, i, direction < 0 ? row : row + 1);
  if (row + direction < 0 || row + direction >= rows.length) return ranking;
  return insert(ranking, i, direction < 0 ? row - 1 : row + 2);
}

// Ties response i with the row above it; takes it out of a tie if it is in one.
export function tie(ranking, i) {
  const row = rowOf(ranking, i), { rows } = ranking;
  if (row >= 0 && rows[row].length > 1) return insert(ranking, i, row + 1);
  if (row < 0) return rows.length ? join(ranking, i, rows.length - 1) : insert(ranking, i, 0);
  return row ? join(ranking, i, row - 1) : ranking;
}

// ---- the list

const NEAR = 0.3; // of a row's height: from its edge inward, a drop is beside the row and not onto it

export class RankingList {
  // `changed(ranking)` is called after each move, `chosen(i)` when a response is clicked.
  constructor(rowsElement, trayElement, chipTemplate, { changed, chosen }) {
    Object.assign(this, { rowsElement, trayElement, chipTemplate, changed, chosen });
  }

  show(ranking, texts, letters) {
    Object.assign(this, { ranking, texts, letters });
    this.rowsElement.replaceChildren(...ranking.rows.map((row, r) => {
      const item = document.createElement("li"), number = document.createElement("span");
      const chips = document.createElement("div");
      number.className = "rank-number";
      number.textContent = r + 1;
      chips.className = "chips";
      chips.append(...row.map(i => this.chip(i)));
      item.append(number, chips);
      return item;
    }));
    this.trayElement.replaceChildren(...ranking.tray.map(i => this.chip(i)));
  }

  chip(i) {
    const chip = this.chipTemplate.content.cloneNode(true).querySelector(".chip");
    const names = { up: "up", down: "down", tie: "tie with the one above" };
    chip.dataset.response = i;
    chip.querySelector(".letter").textContent = this.letters[i];
    chip.querySelector(".excerpt").textContent = this.texts[i];
    for (const button of chip.querySelectorAll("button")) {
      const { move } = button.dataset;
      button.setAttribute("aria-label", `${this.letters[i]}: ${names[move]}`);
      button.addEventListener("click", () => {
        this.move(move === "tie" ? tie(this.ranking, i) : step(this.ranking, i, move === "up" ? -1 : 1));
        const again = document.querySelector(`.chip[data-response="${i}"] [data-move=${move}]`);
        again?.focus();
      });
    }
    chip.addEventListener("pointerdown", event => this.drag(event, chip, i));
    return chip;
  }

  move(ranking) { this.changed(ranking); }

  drag(down, chip, i) {
    if (down.button !== 0 || down.target.closest("button")) return;
    let dragged = false, target = null;
    const moved = event => {
      const y = event.clientY - down.clientY;
      if (!dragged && Math.hypot(event.clientX - down.clientX, y) < 5) return;
      dragged = true;
      chip.classList.add("dragged");
      chip.style.transform = `translateY(${y}px)`;
      target = this.target(event.clientX, event.clientY);
      this.mark(target);
    };
    const ended = event => {
      chip.removeEventListener("pointermove", moved);
      chip.removeEventListener("pointerup", ended);
      chip.removeEventListener("pointercancel", ended);
      chip.classList.remove("dragged");
      chip.style.transform = "";
      this.mark(null);
      if (!dragged) this.chosen(i);
      else if (event.type === "pointerup" && target) {
        this.move(target.join ? join(this.ranking, i, target.row) : insert(this.ranking, i, target.row));
      }
    };
    chip.setPointerCapture(down.pointerId);
    chip.addEventListener("pointermove", moved);
    chip.addEventListener("pointerup", ended);
    chip.addEventListener("pointercancel", ended);
  }

  // Where a drop at this point would go: onto a row, or before one; null outside the list.
  target(x, y) {
    const panel = this.rowsElement.parentElement.getBoundingClientRect();
    if (x < panel.left - 40 || x > panel.right + 40) return null;
    const items = [...this.rowsElement.children];
    for (const [row, item] of items.entries()) {
      const { top, bottom } = item.getBoundingClientRect(), edge = (bottom - top) * NEAR;
      if (y < top + edge) return { row, join: false };
      if (y <= bottom - edge) return { row, join: true };
    }
    return { row: items.length, join: false };
  }

  mark(target) {
    this.rowsElement.classList.toggle("before-0", target?.join === false && target.row === 0);
    for (const [row, item] of [...this.rowsElement.children].entries()) {
      item.classList.toggle("join", target?.join === true && target.row === row);
      item.classList.toggle("after", target?.join === false && target.row === row + 1);
    }
  }
}
