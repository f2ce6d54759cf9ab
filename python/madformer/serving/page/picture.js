// One picture of the stage: what is made of it, the places of blocks still to come, and blocks to be drawn anew.
import { bytesOf } from "./api.js";

const MOST_NUMBERS = 64; // blocks, beyond which their places say nothing but where they are

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

export class Picture {
  /**
   * @param model as the server describes it
   * @param name what was asked for, for those who cannot see the picture
   * @param number from 1
   * @param redraw called with a picture and places of blocks that are to be drawn anew; null where the model cannot
   */
  constructor(model, name, number, redraw) {
    Object.assign(this, { model, name, number, redraw, versions: [], chosen: new Set(), made: new Set(), busy: false });
    this.shown = Promise.resolve();
    this.image = make("img", { alt: "", hidden: true });
    this.cells = Array.from({ length: model.numBlocks }, (_, place) => this.#cell(place));
    this.grid = make("div", { className: "cells" }, ...this.cells);
    this.grid.setAttribute("role", "group");
    this.grid.setAttribute("aria-label", `Blocks of picture ${number}`);
    this.grid.style.gridTemplate = `repeat(${model.rows}, minmax(0, 1fr)) / repeat(${model.columns}, minmax(0, 1fr))`;
    this.grid.addEventListener("keydown", (event) => this.#move(event));
    this.frame = make("div", { className: "frame" }, this.image, this.grid);
    this.frame.style.aspectRatio = `${model.width} / ${model.height}`;
    this.state = make("span", { textContent: "Waiting" });
    this.download = make("a", { textContent: "Download", hidden: true });
    this.undo = make("button", { type: "button", className: "quiet", textContent: "Undo", hidden: true, onclick: () => this.#back() });
    this.several = make("button", { type: "button", className: "quiet", hidden: true, onclick: () => this.#redraw([...this.chosen]) });
    const actions = make("span", { className: "actions" }, this.several, this.undo, this.download);
    this.element = make("figure", { className: "picture" }, this.frame, make("figcaption", {}, this.state, actions));
    this.element.setAttribute("aria-label", `Picture ${number}`);
  }

  get latest() { return this.versions.at(-1); }

  /** Empties the places of blocks that are about to be drawn. */
  begin(blocks = this.cells.keys()) {
    this.busy = true;
    this.waiting = new Set(blocks);
    this.total = this.waiting.size;
    this.made = new Set([...this.cells.keys()].filter((place) => !this.waiting.has(place)));
    this.#choose();
    this.#paint();
  }

  /** How much is drawn, from 0 to 1. */
  get fraction() { return (this.total - this.waiting.size + (this.part ?? 0)) / this.total; }

  step({ block, step, num_steps, fraction }) {
    this.part = num_steps ? step / num_steps : fraction;
    this.#paint(block);
    this.cells[block]?.style.setProperty("--fraction", this.part);
    const nth = this.total - this.waiting.size + 1;
    this.state.textContent = this.total > 1 ? `Block ${nth} of ${this.total}` : "Another block";
  }

  async block({ block, b64_json, output_format }) {
    this.part = 0;
    this.waiting.delete(block);
    await this.#show(bytesOf(b64_json, output_format));
    this.made.add(block);
    this.#paint();
  }

  /** The picture that is done, and its seed. `blob` is what is downloaded, byte for byte what the server made. */
  async finish(blob, seed, format) {
    this.versions.push({ blob, seed, format });
    await this.#settle();
  }

  /** What was made goes; the picture is as it was before, if there was one. */
  async fail(why) {
    await this.#settle();
    if (!this.latest) {
      this.cells.forEach((cell) => { cell.disabled = true; });
      this.state.textContent = why;
    }
  }

  dispose() {
    if (this.url) URL.revokeObjectURL(this.url);
    if (this.download.href) URL.revokeObjectURL(this.download.href);
  }

  async #settle() {
    this.busy = false;
    this.part = 0;
    this.waiting = new Set();
    this.undo.hidden = this.versions.length < 2;
    if (!this.latest) return this.#paint();
    const { blob, seed, format } = this.latest;
    await this.#show(blob);
    this.made = new Set(this.cells.keys());
    this.image.alt = `${this.name || "Picture"}, seed ${seed}`;
    this.state.textContent = `Seed ${seed}`;
    if (this.download.href) URL.revokeObjectURL(this.download.href);
    Object.assign(this.download, { href: URL.createObjectURL(blob), download: `madformer-${seed}.${format}`, hidden: false });
    this.download.setAttribute("aria-label", `Download picture ${this.number}`);
    this.#paint();
  }

  /** One after the other, and only once decoded, so that nothing flickers. */
  #show(blob) {
    this.shown = this.shown.then(async () => {
      const url = URL.createObjectURL(blob);
      const next = new Image();
      next.src = url;
      await next.decode().catch(() => {});
      this.frame.classList.toggle("coarse", next.naturalWidth > 0 && next.naturalWidth * 3 < this.frame.clientWidth);
      if (next.naturalWidth) this.frame.style.aspectRatio = `${next.naturalWidth} / ${next.naturalHeight}`;
      this.image.src = url;
      this.image.hidden = false;
      if (this.url) URL.revokeObjectURL(this.url);
      this.url = url;
    });
    return this.shown;
  }

  #cell(place) {
    const { columns, numBlocks, order } = this.model;
    const cell = make("button", { type: "button", className: "cell", disabled: true, tabIndex: place ? -1 : 0 });
    if (numBlocks <= MOST_NUMBERS) cell.append(make("span", { textContent: `${order.indexOf(place) + 1}` }));
    cell.setAttribute("aria-label", `Block ${order.indexOf(place) + 1}: row ${Math.floor(place / columns) + 1}, column ${(place % columns) + 1}`);
    cell.onclick = (event) => (event.shiftKey ? this.#choose(place) : this.#redraw([...this.chosen.add(place)]));
    return cell;
  }

  #paint(now) {
    const can = this.redraw !== null && !this.busy && Boolean(this.latest);
    this.cells.forEach((cell, place) => {
      cell.classList.toggle("made", this.made.has(place));
      cell.classList.toggle("now", place === now);
      cell.disabled = !can;
      if (can) cell.title = "Draw this block anew";
      else cell.removeAttribute("title");
      if (place !== now) cell.style.removeProperty("--fraction");
    });
    this.undo.disabled = this.busy;
    this.element.setAttribute("aria-busy", String(this.busy));
  }

  #choose(place) {
    if (place === undefined) this.chosen.clear();
    else if (!this.chosen.delete(place)) this.chosen.add(place);
    this.cells.forEach((cell, at) => {
      if (this.chosen.has(at)) cell.setAttribute("aria-pressed", "true");
      else cell.removeAttribute("aria-pressed");
    });
    this.several.hidden = this.chosen.size === 0;
    this.several.textContent = this.chosen.size === 1 ? "Redraw 1 block" : `Redraw ${this.chosen.size} blocks`;
  }

  #redraw(blocks) {
    if (this.busy) return;
    this.#choose();
    this.redraw(this, blocks.sort((a, b) => a - b));
  }

  #back() {
    this.versions.pop();
    this.#settle();
  }

  #move(event) {
    const { columns, numBlocks } = this.model;
    const at = this.cells.indexOf(event.target);
    const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
    if (at < 0 || by === undefined) return;
    event.preventDefault();
    const to = at + by;
    if (to < 0 || to >= numBlocks) return;
    this.cells[at].tabIndex = -1;
    this.cells[to].tabIndex = 0;
    this.cells[to].focus();
  }
}
