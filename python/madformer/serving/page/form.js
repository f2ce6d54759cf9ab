// The form: what the model takes is shown, and what stands in it becomes a request.

import { recall, remember } from "./memory.js";

const KEPT = "madformer-form";
const COUNTS = [1, 2, 4, 8];
const SEEDS = 2 ** 32; // of those that are drawn here; a seed that is typed may be as large as a browser counts exactly

const element = (id) => document.getElementById(id);

/** The server's description of its model, in the names that this page uses. */
export function describe(raw) {
  const [rows, columns] = raw.block_grid;
  return {
    name: raw.name,
    width: raw.image_size[0],
    height: raw.image_size[1],
    rows,
    columns,
    numBlocks: raw.num_blocks,
    order: raw.block_order,
    text: raw.conditioning.includes("text"),
    classes: raw.class_names.length ? raw.class_names : Array.from({ length: raw.num_classes }, (_, number) => `${number}`),
    named: raw.class_names.length > 0,
    steps: raw.default_steps,
    mostSteps: raw.max_steps,
    mostImages: raw.max_images,
    mostPrompt: raw.max_prompt,
    schedulers: raw.schedulers,
    guidance: raw.guidance,
    guidanceScale: raw.default_guidance_scale,
    editing: raw.editing,
    elastic: raw.elastic,
    split: raw.diffusion_layers,
    layers: raw.num_layers,
    formats: raw.formats,
  };
}

export class Form {
  constructor(model) {
    this.model = model;
    this.root = element("form");
    const show = (id, when) => { element(id).hidden = !when; };
    show("prompt-field", model.text);
    show("label-field", model.classes.length > 0);
    show("guidance-field", model.guidance);
    show("interval-field", model.guidance);
    show("negative-field", model.guidance && model.text);
    show("split-field", model.elastic?.length > 1);
    show("scheduler-field", model.schedulers.length > 1);
    options("label", [["", "Any"], ...model.classes.map((name) => [name, name])]);
    options("scheduler", [["", "The model's own"], ...model.schedulers.map((name) => [name, name])]);
    options("format", model.formats.map((name) => [name, { png: "PNG", webp: "WebP", jpeg: "JPEG" }[name] ?? name]));
    this.#counts();
    pair("steps", Math.min(model.mostSteps, Math.max(50, 2 * model.steps)), model.mostSteps);
    pair("guidance", 10, 100);
    element("split").max = Math.max(0, (model.elastic?.length ?? 1) - 1);
    element("split").addEventListener("input", () => this.#split());
    element("dice").onclick = () => { element("seed").value = this.anotherSeed(); element("fresh").checked = false; };
    element("seed").addEventListener("input", ({ target }) => {
      const exact = Number.isSafeInteger(Number(target.value) + model.mostImages); // the last picture's, too
      target.setCustomValidity(exact ? "" : `This page counts to ${Number.MAX_SAFE_INTEGER - model.mostImages}; the API takes larger seeds.`);
      element("fresh").checked = false;
    });
    element("prompt").maxLength = element("negative").maxLength = model.mostPrompt;
    this.root.addEventListener("invalid", () => { element("settings").open = element("more").open = true; }, true);
    element("settings").open = matchMedia("(min-width: 56.01rem)").matches;
    this.fill(recall(KEPT) ?? {});
    element("fresh").checked = true;
  }

  /** A request of what stands in the form; `now` where it is sent, which keeps it and may draw another seed. */
  request(now) {
    const { model } = this, value = (id) => element(id).value.trim(), request = {};
    if (now && element("fresh").checked) element("seed").value = this.anotherSeed();
    if (model.text && value("prompt")) request.prompt = value("prompt");
    if (model.classes.length && value("label")) request.label = model.named ? value("label") : Number(value("label"));
    if (model.guidance && model.text && value("negative")) request.negative_prompt = value("negative");
    const count = Number(this.root.elements.count.value);
    if (count > 1) request.num_images = count;
    request.steps = Number(value("steps"));
    if (model.guidance) {
      request.guidance_scale = Number(value("guidance"));
      const low = value("interval-low"), high = value("interval-high");
      if (low || high) request.guidance_interval = [Number(low || 0), Number(high || 1000)];
    }
    request.seed = Number(value("seed") || this.#seed());
    if (value("scheduler")) request.scheduler = value("scheduler");
    if (model.elastic?.length > 1) request.diffusion_layers = model.elastic[Number(value("split"))];
    if (value("format") !== "png") request.output_format = value("format");
    if (now) remember(KEPT, request);
    return request;
  }

  fill(request) {
    const { model } = this;
    const set = (id, value) => { element(id).value = value; element(id).dispatchEvent(new Event("input")); };
    set("prompt", request.prompt ?? "");
    element("label").value = model.classes.includes(`${request.label}`) ? request.label : "";
    set("negative", request.negative_prompt ?? "");
    set("steps", Math.min(request.steps ?? model.steps, model.mostSteps));
    set("guidance", request.guidance_scale ?? model.guidanceScale);
    set("interval-low", request.guidance_interval?.[0] ?? "");
    set("interval-high", request.guidance_interval?.[1] ?? "");
    set("seed", request.seed ?? this.anotherSeed());
    element("scheduler").value = model.schedulers.includes(request.scheduler) ? request.scheduler : "";
    element("format").value = model.formats.includes(request.output_format) ? request.output_format : model.formats[0];
    const counts = this.root.elements.count;
    counts.value = String(request.num_images ?? 1);
    if (!counts.value) counts.value = "1";
    element("split").value = Math.max(0, model.elastic?.indexOf(request.diffusion_layers ?? model.split) ?? 0);
    this.#split();
  }

  /** What a request is about, in a few words. */
  nameOf({ prompt, label }) {
    return [prompt, label].filter((part) => part !== undefined).join(" · ") || this.model.name;
  }

  anotherSeed() { return crypto.getRandomValues(new Uint32Array(1))[0] % SEEDS; }

  #seed() {
    const seed = this.anotherSeed();
    element("seed").value = seed;
    return seed;
  }

  #counts() {
    const most = this.model.mostImages;
    element("counts").replaceChildren(...COUNTS.filter((count) => count <= most).map((count) => {
      const label = document.createElement("label"), input = document.createElement("input");
      Object.assign(input, { type: "radio", name: "count", value: count, checked: count === 1 });
      label.append(input, `${count}`);
      return label;
    }));
  }

  #split() {
    const { elastic, layers } = this.model;
    if (!elastic) return;
    const diffusion = elastic[Number(element("split").value)];
    const text = layers ? `${layers - diffusion} autoregressive, ${diffusion} diffusion` : `${diffusion} diffusion layers`;
    element("split-text").textContent = `${text}. Diffusion layers run at every step, the others once for each block.`;
    element("split").setAttribute("aria-valuetext", text);
  }
}

function options(id, choices) {
  element(id).replaceChildren(...choices.map(([value, text]) => new Option(text, value)));
}

/** A slider up to what is usual beside a number up to what is possible. */
function pair(id, usual, most) {
  const number = element(id), range = element(`${id}-range`);
  range.max = usual;
  number.max = most;
  range.addEventListener("input", () => { number.value = range.value; });
  number.addEventListener("input", () => { range.value = number.value; });
}
