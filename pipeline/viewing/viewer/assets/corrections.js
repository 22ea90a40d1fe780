// Corrects the classes of regions: select a region, then press the key of its right class.
//
// The server saves each correction in a file beside the result before the page shows it as saved. The result stays as it is.

import { cleared, pathOf, strokeLines } from "./outlines.js";
import { area } from "./readout.js";

const byId = (id) => document.getElementById(id);
const FIT = 0.5; // share of the view that a region found with n or N fills
const LARGEST_ZOOM = 1;

export class Corrections {
  // `page` has view(), goTo(view), announce(text), note(text) and classesOn().
  constructor(facts, outlines, page) {
    Object.assign(this, { facts, outlines, page });
    this.on = false;
    this.selected = null; // the selected polygon
    this.saved = new Map(); // number of a region -> its new label
    this.shapes = []; // the corrected polygons
    this.saving = Promise.resolve();
    byId("correcting").addEventListener("change", (event) => this.turn(event.target.checked));
    for (const button of this.buttons()) {
      button.querySelector(".swatch").style.background = facts.classes[Number(button.dataset.class)].color;
      button.addEventListener("click", () => this.relabel(Number(button.dataset.class) + 1));
    }
    byId("next-by-area").addEventListener("click", () => this.next("area"));
    byId("next-by-uncertainty").addEventListener("click", () => this.next("uncertainty"));
    byId("undo-correction").addEventListener("click", () => this.undo());
    this.render();
  }

  // Reads what was saved before. Needs the view.
  start() { this.read(fetch("corrections.json")); }

  buttons() { return [...document.querySelectorAll(".relabel")]; }

  turn(on) {
    this.on = on;
    byId("correcting").checked = on;
    byId("correction-tools").hidden = !on;
    if (!on) this.select(null);
    else this.page.announce("Correct regions: click a region, or press n for the next one");
  }

  // Returns what a key does, or undefined if it has another meaning.
  key(key) {
    if (key === "c") return () => this.turn(!this.on);
    if (!this.on) return undefined;
    if (/^[1-9]$/.test(key)) return () => this.relabel(Number(key));
    return {
      n: () => this.next("area"), N: () => this.next("uncertainty"), z: () => this.undo(),
      Escape: () => (this.selected ? this.select(null) : this.turn(false)),
    }[key];
  }

  // Selects the region at a place.
  async pick(x, y) {
    if (!this.on) return;
    this.select(await this.outlines.request({ what: "at", x, y, zoom: this.page.view().zoom, on: this.page.classesOn() }));
  }

  async next(by) {
    const question = { what: "next", by, after: this.selected?.index ?? null, on: this.page.classesOn(), skip: [...this.saved.keys()] };
    const index = await this.outlines.request(question);
    if (index === null) {
      this.page.announce("No other region");
      return;
    }
    const [region] = await this.outlines.request({ what: "regions", indices: [index], zoom: this.page.view().zoom });
    const [left, top, right, bottom] = region.box;
    const { width, height } = this.page.view();
    const zoom = Math.min(LARGEST_ZOOM, (FIT * width) / (right - left), (FIT * height) / (bottom - top));
    this.page.goTo({ x: (left + right) / 2, y: (top + bottom) / 2, zoom });
    this.select(region);
  }

  select(region) {
    this.selected = region;
    this.render();
    if (region) this.page.announce(`Selected: ${this.describe(region)}`);
    this.outlines.changed();
  }

  describe(region) {
    const after = this.saved.get(region.index);
    const now = this.facts.classes[(after ?? region.label) - 1].name;
    const before = after === undefined ? "" : ` (before: ${this.facts.classes[region.label - 1].name})`;
    return `${now}${before}, ${area(region.area_mm2)}`;
  }

  relabel(label) {
    const region = this.selected;
    if (!this.facts.classes[label - 1]) return;
    if (!region) {
      this.page.announce("First select a region");
      return;
    }
    const body = { index: region.index, label: region.label, area_mm2: region.area_mm2, after: label };
    this.save("corrections", body, () => `Saved: ${this.describe(region)}`);
  }

  undo() { this.save("corrections/undo", {}, () => "Undone"); }

  // Saves one after the other, in the order of the keys.
  save(path, body, said) {
    byId("corrections-saved").textContent = "";
    this.saving = this.saving.then(async () => {
      const headers = { "Content-Type": "application/json" };
      if (await this.read(fetch(path, { method: "POST", headers, body: JSON.stringify(body) }), "NOT saved: ")) {
        byId("corrections-saved").textContent = said();
        this.page.announce(said());
      }
    });
  }

  // Takes over the server's state. Returns whether there was one.
  async read(request, failure = "") {
    const answer = await request.catch(() => null);
    if (!answer?.ok) {
      this.page.note(failure + (answer ? await answer.text() : "wsi-view has ended. Start it again, then reload the page."));
      return false;
    }
    const state = await answer.json();
    this.saved = new Map(state.corrections.map(({ index, after }) => [index, after]));
    byId("correction-count").textContent = `Corrected regions: ${this.saved.size}`
      + (state.others ? `; ${state.others} more belong to an earlier result` : "");
    byId("export-corrections").hidden = !this.saved.size;
    await this.refresh();
    return true;
  }

  // Reads the shapes again in the level of detail of this zoom.
  async refresh() {
    const selected = this.selected ? [this.selected.index] : [];
    const indices = [...this.saved.keys(), ...selected];
    if (!indices.length) this.shapes = [];
    else {
      const regions = await this.outlines.request({ what: "regions", indices, zoom: this.page.view().zoom });
      const last = selected.length ? regions.pop() : null;
      if (last?.index === this.selected?.index) this.selected = last;
      this.shapes = regions;
    }
    this.render();
    this.outlines.changed();
  }

  render() {
    byId("selected-region").textContent = this.selected ? this.describe(this.selected) : "none: click a region, or press n";
    for (const button of this.buttons()) {
      const label = Number(button.dataset.class) + 1;
      const now = this.selected && (this.saved.get(this.selected.index) ?? this.selected.label);
      button.disabled = !this.selected;
      button.setAttribute("aria-pressed", String(now === label));
    }
  }

  // Draws the corrected regions and the selected one for a view. Called for every frame of the slide.
  draw(view) {
    const [context, ratio] = cleared(byId("corrected"), view);
    for (const region of this.shapes) {
      const after = this.saved.get(region.index);
      if (after === undefined) continue;
      const path = pathOf(region, view, ratio);
      context.fillStyle = `${this.facts.classes[after - 1].color}b0`;
      context.fill(path, "evenodd");
      strokeLines(context, path, ratio, [["#000", 3], ["#fff", 1.5]]);
    }
    if (this.selected) strokeLines(context, pathOf(this.selected, view, ratio), ratio, [["#000", 7], ["#ffe14d", 4]]);
  }
}
