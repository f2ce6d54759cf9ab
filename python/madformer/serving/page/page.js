// The page: a form that asks, a stage where pictures appear block by block, and what was drawn before.
import { ApiError, base64Of, bytesOf, call, drawing, failureOf, hasKey, onKeyWanted } from "./api.js";
import * as code from "./code.js";
import * as history from "./history.js";
import { describe, Form } from "./form.js";
import { recall, remember } from "./memory.js";
import { Picture } from "./picture.js";
import * as strip from "./strip.js";

const JOB = "madformer-job", THEME = "madformer-theme";
const SPOKEN = 1200; // milliseconds between two words on progress, so that a screen reader can follow

const element = (id) => document.getElementById(id);
let model, form;
let current = null; // what the form asked for last, while it is drawn: { stop: AbortController }
let pictures = [];
let lastSaid = 0;

function say(text, soon = true) {
  if (!soon && performance.now() - lastSaid < SPOKEN) return;
  lastSaid = performance.now();
  element("said").textContent = text;
}

function complain(error, again) {
  console.error(error);
  const text = document.createElement("p");
  text.textContent = error instanceof ApiError ? error.message : `Something in this page failed: ${error.message}`;
  const button = document.createElement("button");
  Object.assign(button, { type: "button", textContent: again ? "Try again" : "Close" });
  button.onclick = () => { quiet(); again?.(); };
  element("alert").replaceChildren(text, button);
}
const quiet = () => element("alert").replaceChildren();

function stage(list) {
  pictures.forEach((picture) => picture.dispose());
  pictures = list;
  element("pictures").dataset.count = list.length;
  element("pictures").replaceChildren(...list.map((picture) => picture.element));
  element("edit-hint").hidden = true;
}

const placed = (request, of = model) => Array.from({ length: request.num_images ?? 1 }, (_, index) => {
  const picture = new Picture(of, form.nameOf(request), index + 1, of.editing ? redraw : null);
  picture.request = request;
  return picture;
});

function progress() {
  const busy = pictures.filter((picture) => picture.busy);
  const done = pictures.length ? pictures.reduce((sum, picture) => sum + (picture.busy ? picture.fraction : 1), 0) / pictures.length : 0;
  element("progress").hidden = busy.length === 0;
  element("progress").value = done;
  document.title = busy.length ? `${Math.round(100 * done)} % · madformer` : "madformer";
}

/** Follows a request to its end; `drawn[i]` is where its image `i` appears. Gives the pictures that came. */
async function follow(start, request, drawn, stop, onId = () => {}) {
  const came = [];
  let started = false;
  for await (const { type, data } of drawing(start, stop.signal)) {
    const picture = drawn[data.index ?? 0];
    if (data.id) onId(data.id);
    if (type === "queued") {
      const wait = data.estimated_seconds ? `, about ${Math.ceil(data.estimated_seconds)} s` : "";
      say(data.position > 0 ? `${data.position} in the queue before it${wait}` : "Waiting for a slot");
    } else if (type === "started") {
      if (!started) say("Drawing");
      started = true;
    } else if (type === "step") {
      picture.step(data);
    } else if (type === "block") {
      await picture.block(data);
      const made = drawn.reduce((sum, one) => sum + one.total - one.waiting.size, 0);
      say(`${made} of ${drawn.reduce((sum, one) => sum + one.total, 0)} blocks are made`, made === 1);
    } else if (type === "finished") {
      const format = data.output_format ?? request.output_format ?? "png";
      const blob = bytesOf(data.b64_json, format);
      came.push({ seed: data.seed, format, blob });
      await picture.finish(blob, data.seed, format);
      if (model.editing) element("edit-hint").hidden = false;
    } else if (type === "error") {
      await picture.fail("Not drawn");
      complain(failureOf(data));
    } else if (type === "done") {
      const count = drawn.length === 1 ? "Finished" : `Finished ${drawn.length} pictures`;
      say(data.seconds ? `${count} in ${data.seconds.toFixed(1)} s` : count);
    }
    progress();
  }
  return came;
}

/** Draws `request`, or goes on with the one whose id `resumed` is. */
async function draw(request, resumed = null) {
  quiet();
  const stop = new AbortController(), drawn = placed(request), entry = { time: Date.now(), model: model.name, request, pictures: [] };
  current = { stop };
  element("draw").textContent = "Stop";
  stage(drawn);
  drawn.forEach((picture) => picture.begin());
  say("Sending");
  element("pictures").scrollIntoView({ block: "nearest" });
  strip.expect(true);
  const finished = () => drawn.flatMap((picture) => (picture.latest ? [picture.latest] : []));
  try {
    await follow(resumed ?? request, request, drawn, stop, (id) => remember(JOB, { id, request }, { tab: true }));
  } catch (error) {
    const why = stop.signal.aborted ? "Stopped" : "Not drawn";
    await Promise.all(drawn.filter((picture) => picture.busy).map((picture) => picture.fail(why)));
    say(resumed ? "What was being drawn ended with the page" : why);
    if (!stop.signal.aborted && !resumed) complain(error, () => draw(request));
  } finally {
    current = null;
    remember(JOB, null, { tab: true });
    element("draw").textContent = "Draw";
    strip.expect(false);
    progress();
  }
  entry.pictures = finished();
  if (entry.pictures.length) await kept(entry);
}

/** Draws some blocks of a picture anew, with another seed, and keeps the others. */
async function redraw(picture, blocks) {
  quiet();
  const { blocks: _, ...asked } = picture.request;
  const request = { ...asked, num_images: 1, seed: form.anotherSeed(), blocks };
  const stop = new AbortController(), before = picture.latest;
  picture.stop = stop;
  picture.begin(blocks);
  say(blocks.length === 1 ? "Drawing a block anew" : `Drawing ${blocks.length} blocks anew`);
  strip.expect(true);
  try {
    const came = await follow({ ...request, image: await base64Of(before.blob) }, request, [picture], stop);
    await kept({ time: Date.now(), model: model.name, request, pictures: came });
    picture.cells[blocks[0]].focus();
  } catch (error) {
    await picture.fail("Not drawn");
    say(stop.signal.aborted ? "Stopped" : "The block is as it was");
    if (!stop.signal.aborted) complain(error, () => redraw(picture, blocks));
  } finally {
    strip.expect(current !== null);
    progress();
  }
}

async function kept(entry) {
  try {
    await history.add(entry);
  } catch (error) {
    complain(new ApiError(`This browser does not keep the picture (${error.name}): download it.`));
  }
}

/** Shows what was drawn before, and asks for the same again. */
async function reopen(entry) {
  if (current) return say("Something is being drawn: stop it first");
  quiet();
  const { blocks, ...request } = entry.request;
  form.fill(request);
  // another model's picture has other blocks, which this one cannot draw
  const of = entry.model === model.name ? model : { ...model, rows: 1, columns: 1, numBlocks: 1, order: [0], editing: false };
  const shown = placed({ ...request, num_images: entry.pictures.length }, of);
  stage(shown);
  await Promise.all(shown.map((picture, index) => {
    const { blob, seed, format } = entry.pictures[index];
    picture.begin([]);
    return picture.finish(blob, seed, format);
  }));
  element("edit-hint").hidden = !of.editing;
  progress();
  say(`From history: ${form.nameOf(request)}`);
  element("stage").focus({ preventScroll: true });
  element("stage").scrollIntoView({ block: "nearest" });
}

function stopAll() {
  current?.stop.abort();
  pictures.forEach((picture) => picture.busy && picture.stop?.abort());
}

function dialogs() {
  const opened = (dialog) => new Promise((resolve) => {
    dialog.returnValue = "";
    dialog.showModal();
    dialog.addEventListener("close", () => resolve(dialog.returnValue), { once: true });
  });
  onKeyWanted(async (again) => {
    const value = element("key-value");
    value.value = "";
    element("key-hint").textContent = again ? "The server does not know that key." : "It is kept until this tab is closed, and sent to this server alone.";
    return (await opened(element("key"))) === "use" ? value.value.trim() : null;
  });
  element("history-clear").onclick = async () => (await opened(element("sure"))) === "yes" && history.removeAll();
  element("code-open").onclick = () => {
    const request = form.request(false), url = new URL(".", document.baseURI).href;
    element("curl").textContent = code.curl(request, url, hasKey());
    element("python").textContent = code.python(request, url, hasKey());
    element("code").showModal();
  };
  document.querySelectorAll("[data-close]").forEach((button) => { button.onclick = () => button.closest("dialog").close(); });
  document.querySelectorAll("[data-copy]").forEach((button) => {
    button.onclick = async () => {
      const source = element(button.dataset.copy);
      try {
        await navigator.clipboard.writeText(source.textContent);
        button.textContent = "Copied";
      } catch { // without TLS a browser has no clipboard for pages
        getSelection().selectAllChildren(source);
        button.textContent = "Selected";
      }
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    };
  });
}

function theme() {
  const names = ["", "dark", "light"];
  const set = (value) => {
    if (value) document.documentElement.dataset.theme = value;
    else delete document.documentElement.dataset.theme;
    element("theme").setAttribute("aria-label", `Colours: ${value || "as the system has them"}`);
    remember(THEME, value);
  };
  set(names.find((name) => name === recall(THEME)) ?? "");
  element("theme").onclick = () => set(names[(names.indexOf(document.documentElement.dataset.theme ?? "") + 1) % names.length]);
}

function keys(event) {
  if (document.querySelector("dialog[open]")) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !current) {
    event.preventDefault();
    element("form").requestSubmit();
  } else if (event.key === "Escape") {
    stopAll();
  }
}

async function main() {
  theme();
  dialogs();
  strip.begin();
  document.addEventListener("keydown", keys);
  model = describe(await (await call("api/v1/model")).json());
  element("model-name").textContent = model.name;
  form = new Form(model);
  element("form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (current) stopAll();
    else draw(form.request(true));
  });
  await history.begin(reopen);
  const job = recall(JOB, { tab: true });
  if (job) return draw(job.request, job.id);
  stage(placed({}));
  pictures[0].state.textContent = model.numBlocks > 1 ? `${model.numBlocks} blocks, drawn one after the other` : "";
}

main().catch((error) => complain(error, () => location.reload()));
