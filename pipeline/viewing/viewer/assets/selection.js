// The selected regions: chosen by click, with n and N, or in the table. They can be saved as GeoJSON.

import { announce } from "./notices.js";
import { pathOf, strokeLines } from "./outlines.js";
import { area } from "./readout.js";

const byId = (id) => document.getElementById(id);
const FIT = 0.5; // share of the view that a region fills
const LARGEST_ZOOM = 1;

export class Selection {
  // `classesOn` returns which classes are shown.
  constructor(facts, outlines, stage, classesOn) {
    Object.assign(this, { facts, outlines, stage, classesOn });
    this.regions = []; // the selected polygons in the order in which they were selected
    this.corrected = new Map(); // number of a corrected region -> its new label
    this.changed = () => {};
    byId("next-by-area").addEventListener("click", () => this.next("area"));
    byId("next-by-uncertainty").addEventListener("click", () => this.next("uncertainty"));
    this.render();
  }

  // The region that was selected last, or null.
  get last() { return this.regions.at(-1) ?? null; }

  numbers() { return this.regions.map(({ index }) => index); }

  // Selects the region at a place. With `adding`, adds it to the others, or takes it away again.
  async pick([x, y], adding) {
    const question = { what: "at", x, y, zoom: this.stage.view().zoom, on: this.classesOn() };
    const region = await this.outlines.request(question);
    if (region || !adding) this.select(region, adding);
  }

  async next(by) {
    const question = { what: "next", by, after: this.last?.index ?? null, on: this.classesOn(), skip: [...this.corrected.keys()] };
    const index = await this.outlines.request(question);
    if (index === null) announce("No other region");
    else this.go(index);
  }

  // Selects the region with this number and moves the view there.
  async go(index, adding = false) {
    const [region] = await this.outlines.request({ what: "regions", indices: [index], zoom: this.stage.view().zoom });
    const [left, top, right, bottom] = region.box;
    const { width, height } = this.stage.view();
    const zoom = Math.min(LARGEST_ZOOM, (FIT * width) / (right - left), (FIT * height) / (bottom - top));
    this.stage.goTo({ x: (left + right) / 2, y: (top + bottom) / 2, zoom });
    this.select(region, adding);
  }

  select(region, adding = false) {
    const others = this.regions.filter(({ index }) => index !== region?.index);
    const known = others.length < this.regions.length;
    if (!adding) this.regions = region ? [region] : [];
    else this.regions = known ? others : [...others, region];
    this.render();
    if (adding) announce(known ? `Removed from the selection: ${this.describe(region)}` : `Added to the selection: ${this.describe(region)}`);
    else if (region) announce(`Selected: ${this.describe(region)}`);
    this.changed();
    this.outlines.changed();
  }

  describe(region) {
    const { classes } = this.facts;
    const after = this.corrected.get(region.index);
    const before = after === undefined ? "" : ` (before: ${classes[region.label - 1].name})`;
    return `${classes[(after ?? region.label) - 1].name}${before}, ${area(region.area_mm2)}`;
  }

  // Reads the shapes again in the level of detail of this zoom.
  async refresh() {
    if (!this.regions.length) return;
    const indices = this.numbers();
    const regions = await this.outlines.request({ what: "regions", indices, zoom: this.stage.view().zoom });
    if (String(indices) === String(this.numbers())) this.regions = regions;
    this.outlines.changed();
  }

  render() {
    const several = this.regions.length > 1 ? `${this.regions.length} regions; the last: ` : "";
    byId("selected-region").textContent = this.last ? several + this.describe(this.last) : "none: click a region, or press n";
    const link = byId("export-regions");
    link.hidden = !this.last;
    link.href = `regions.geojson?numbers=${this.numbers().join(",")}`;
  }

  // Draws the selected regions on the context of `cleared`.
  draw(context, view, ratio) {
    for (const region of this.regions) strokeLines(context, pathOf(region, view, ratio), ratio, [["#000", 7], ["#ffe14d", 4]]);
  }
}
