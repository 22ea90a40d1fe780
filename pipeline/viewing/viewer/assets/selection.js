// The selected regions: chosen by click, with n and N, or in the table. They can be saved as GeoJSON.

import { dataUrl } from "./data.js";
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
    this.choice = null; // the promise of the next choice, until it is known
    this.corrected = new Map(); // number of a corrected region -> its new label
    this.changed = () => {};
    byId("next-by-area").addEventListener("click", () => this.next("area"));
    byId("next-by-uncertainty").addEventListener("click", () => this.next("uncertainty"));
    this.render();
  }

  // The region that was selected last, or null.
  get last() { return this.regions.at(-1) ?? null; }

  // Whether no region is selected or being looked up.
  get empty() { return !this.last && !this.choice; }

  numbers() { return this.regions.map(({ index }) => index); }

  // Returns the regions that will be selected once the last choice is known.
  async chosen() { return this.choice ? (await this.choice).regions : this.regions; }

  // Selects the region at a place. With `adding`, adds it to the others, or takes it away again.
  pick([x, y], adding) {
    const before = this.chosen();
    const found = this.outlines.request({ what: "at", x, y, zoom: this.stage.view().zoom, on: this.classesOn() });
    return this.choose(found.then((region) => choiceOf(region, adding, before)));
  }

  next(by) {
    const before = this.chosen();
    return this.choose((async () => {
      const after = (await before).at(-1)?.index ?? null;
      const question = { what: "next", by, after, on: this.classesOn(), skip: [...this.corrected.keys()] };
      const index = await this.outlines.request(question);
      if (index === null) return { regions: await before, what: "No other region" };
      return choiceOf(await this.region(index));
    })(), true);
  }

  // Selects the region with this number and moves the view there.
  go(index, adding = false) {
    const before = this.chosen();
    return this.choose(this.region(index).then((region) => choiceOf(region, adding, before)), true);
  }

  clear() { return this.choose(Promise.resolve(choiceOf(null))); }

  async region(index) {
    const [region] = await this.outlines.request({ what: "regions", indices: [index], zoom: this.stage.view().zoom });
    return region;
  }

  // Shows a choice once it is known, unless another one has followed it by then.
  async choose(choice, moving = false) {
    this.choice = choice;
    const { regions, region, what } = await choice;
    if (choice !== this.choice) return;
    this.choice = null;
    this.regions = regions;
    if (region && moving) this.moveTo(region);
    this.render();
    if (what) announce(region ? `${what}: ${this.describe(region)}` : what);
    this.changed();
    this.outlines.changed();
  }

  moveTo({ box: [left, top, right, bottom] }) {
    const { width, height } = this.stage.view();
    const zoom = Math.min(LARGEST_ZOOM, (FIT * width) / (right - left), (FIT * height) / (bottom - top));
    this.stage.goTo({ x: (left + right) / 2, y: (top + bottom) / 2, zoom });
  }

  describe(region) { return `${this.className(region)}, ${area(region.area_mm2)}`; }

  className(region) {
    const { classes } = this.facts;
    const before = this.corrected.has(region.index) ? ` (before: ${classes[region.label - 1].name})` : "";
    return `${classes[this.labelOf(region) - 1].name}${before}`;
  }

  // Returns the label of a region's class, corrected or not.
  labelOf({ index, label }) { return this.corrected.get(index) ?? label; }

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
    link.href = dataUrl(`regions.geojson?numbers=${this.numbers().join(",")}`);
  }

  // Draws the selected regions on the context of `cleared`.
  draw(context, view, ratio) {
    for (const region of this.regions) strokeLines(context, pathOf(region, view, ratio), ratio, [["#000", 7], ["#ffe14d", 4]]);
  }
}

// Returns {regions, region, what}: the selected regions, and which of them was chosen and how. `before` is the promise of the
// regions to which `adding` adds the region, or from which it takes it away.
async function choiceOf(region, adding = false, before = null) {
  if (!adding) return { regions: region ? [region] : [], region, what: region && "Selected" };
  const others = (await before).filter(({ index }) => index !== region?.index);
  if (!region) return { regions: others };
  if (others.length < (await before).length) return { regions: others, region, what: "Removed from the selection" };
  return { regions: [...others, region], region, what: "Added to the selection" };
}
