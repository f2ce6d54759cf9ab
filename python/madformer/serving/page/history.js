// The list of what was drawn, the newest first.
import { make } from "./picture.js";
import * as store from "./store.js";

const SHOWN = 4; // pictures of an entry

const element = (id) => document.getElementById(id);
let open, entries = [], urls = [];

/** Shows what is kept; `reopen` is called with an entry that is chosen. */
export async function begin(reopen) {
  open = reopen;
  entries = await store.all();
  paint();
}

export async function add(entry) {
  await store.keep(entry);
  entries = await store.all();
  paint();
}

export async function removeAll() {
  await store.clear();
  entries = [];
  paint();
}

async function remove(entry) {
  await store.forget(entry.key);
  const at = entries.indexOf(entry);
  entries.splice(at, 1);
  paint();
  const next = element("history-list").children[Math.min(at, entries.length - 1)];
  (next?.querySelector("button") ?? element("draw")).focus();
}

function paint() {
  urls.forEach((url) => URL.revokeObjectURL(url));
  urls = [];
  element("history-list").replaceChildren(...entries.map(item));
  element("history-clear").hidden = entries.length === 0;
  element("history-empty").hidden = entries.length > 0;
}

function item(entry) {
  const { request, pictures } = entry;
  const name = [request.prompt, request.label].filter(Boolean).join(" · ") || entry.model;
  const images = pictures.slice(0, SHOWN).map(({ blob }) => {
    const url = URL.createObjectURL(blob);
    urls.push(url);
    return make("img", { src: url, alt: "" });
  });
  const button = make("button", { type: "button", className: "kept", onclick: () => open(entry) },
    make("span", { className: "mosaic" }, ...images), make("span", { className: "name", textContent: name }));
  button.dataset.count = images.length;
  const many = pictures.length > 1 ? `, ${pictures.length} pictures` : "";
  const edited = request.blocks ? ", redrawn" : "";
  button.setAttribute("aria-label", `${name}${many}${edited}, seed ${pictures[0].seed}, ${new Date(entry.time).toLocaleString()}`);
  const forget = make("button", { type: "button", className: "forget", textContent: "✕", onclick: () => remove(entry) });
  forget.setAttribute("aria-label", `Remove ${name}, seed ${pictures[0].seed}`);
  return make("li", {}, button, forget);
}
