// The strip at the top: the queue, the batch's slots and how full they were for a minute.
import { call } from "./api.js";

const POINTS = 60, MOST_SLOTS = 32;
const BUSY = 1000, IDLE = 4000; // milliseconds between two looks

const element = (id) => document.getElementById(id);
const fills = [];
let timer, working = false;

async function look() {
  clearTimeout(timer);
  if (document.hidden) return;
  let status = null;
  try {
    status = await (await call("api/v1/status", { quiet: true })).json();
  } catch (error) {
    element("load").textContent = error.status === 401 ? "Key needed" : error.status === 429 ? "Busy" : "No answer";
  }
  if (status) paint(status);
  timer = setTimeout(look, working || status?.running || status?.waiting ? BUSY : IDLE);
}

function paint({ ready, draining, waiting, running, slots, steps_per_second: speed, batch_fill: fill }) {
  const squares = Math.min(slots, MOST_SLOTS), on = Math.ceil((running / slots) * squares);
  const shown = element("slots");
  while (shown.children.length > squares) shown.lastChild.remove();
  while (shown.children.length < squares) shown.append(document.createElement("i"));
  [...shown.children].forEach((square, place) => square.classList.toggle("on", place < on));
  shown.setAttribute("aria-label", `${running} of ${slots} slots in use`);

  fills.push(Math.max(0, Math.min(1, fill ?? running / slots)));
  fills.splice(0, fills.length - POINTS);
  const line = fills.map((value, place) => `${POINTS - fills.length + place},${19 - 18 * value}`).join(" ");
  document.querySelector("#spark polyline").setAttribute("points", line);
  document.querySelector("#spark polygon").setAttribute("points", `${POINTS - fills.length},20 ${line} ${POINTS - 1},20`);

  const parts = [`${waiting} waiting`, `${running} of ${slots}`];
  if (speed && running) parts.push(`${speed < 10 ? speed.toFixed(1) : Math.round(speed)} steps/s`);
  element("load").textContent = draining ? "Stopping" : ready === false ? "Starting" : parts.join(" · ");
}

/** Looks more often while something is drawn. */
export function expect(work) {
  working = work;
  look();
}

export function begin() {
  document.addEventListener("visibilitychange", look);
  look();
}
