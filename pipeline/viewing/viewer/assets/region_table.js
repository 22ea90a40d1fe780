// The table of the regions of the classes that are shown, page by page. A row selects its region; a selected region is
// marked in its row.

import { swatchOf } from "./controls.js";
import { area } from "./readout.js";

const byId = (id) => document.getElementById(id);
const ROWS = 12;
const whole = new Intl.NumberFormat("en");

export class RegionTable {
  constructor(facts, outlines, selection, classesOn) {
    Object.assign(this, { facts, outlines, selection, classesOn });
    this.on = false;
    this.by = "area";
    this.upward = false; // the smallest value first
    this.page = { rows: [], first: 0, total: 0 }; // the rows that are shown, and the number of the first one
    byId("table-on").addEventListener("change", (event) => this.turn(event.target.checked));
    for (const button of this.heads()) button.addEventListener("click", () => this.sort(button.dataset.by));
    byId("rows-before").addEventListener("click", () => this.show(this.page.first - ROWS));
    byId("rows-after").addEventListener("click", () => this.show(this.page.first + ROWS));
    // Asks again for the last page, which may not be shown yet.
    outlines.measured = () => { if (this.asked) this.show(this.asked.first, this.asked.holding); };
  }

  heads() { return [...document.querySelectorAll("#region-table thead button")]; }

  turn(on) {
    this.on = on;
    byId("table-on").checked = on;
    byId("region-table").hidden = !on;
    if (!on) return;
    byId("panel-details").open = true;
    byId("region-table").scrollIntoView({ block: "nearest" });
    this.follow();
  }

  sort(by) {
    this.upward = this.by === by && !this.upward;
    this.by = by;
    this.show(0);
  }

  // Shows the page that holds the region that was selected last.
  follow() { this.show(this.page.first, this.selection.last?.index ?? null); }

  // Shows the first page if other classes are shown than before.
  update() { if (String(this.classesOn()) !== String(this.asked?.on)) this.show(0); }

  async show(first, holding = null) {
    if (!this.on) return;
    const question = { what: "rows", by: this.by, upward: this.upward, on: this.classesOn(), first: Math.max(0, first), count: ROWS, holding };
    this.asked = question;
    const page = await this.outlines.request(question);
    if (this.asked !== question) return;
    this.page = page;
    this.render();
  }

  render() {
    const { rows, first, total } = this.page;
    const selected = new Set(this.selection.numbers());
    const focused = document.activeElement?.closest("#rows tr")?.dataset.index;
    byId("rows").replaceChildren(...rows.map((row) => this.row(row, selected.has(row.index))));
    byId("rows").querySelector(`tr[data-index="${focused}"] button`)?.focus();
    byId("rows-shown").textContent = total ? `${whole.format(first + 1)}–${whole.format(first + rows.length)} of ${whole.format(total)}` : "no regions";
    // A disabled button would lose the focus.
    byId("rows-before").setAttribute("aria-disabled", String(first === 0));
    byId("rows-after").setAttribute("aria-disabled", String(first + rows.length >= total));
    for (const button of this.heads()) {
      const sorted = this.upward ? "ascending" : "descending";
      button.closest("th").setAttribute("aria-sort", button.dataset.by === this.by ? sorted : "none");
    }
  }

  row(region, selected) {
    const { index, area_mm2, probability } = region;
    const row = document.createElement("tr");
    row.dataset.index = index;
    row.addEventListener("click", (event) => this.selection.go(index, event.shiftKey));
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-pressed", String(selected));
    const { color } = this.facts.classes[this.selection.labelOf(region) - 1];
    button.append(swatchOf(color), ` ${this.selection.className(region)}`);
    const head = document.createElement("th");
    head.scope = "row";
    head.append(button);
    row.append(head, ...[area(area_mm2), probability === null ? "…" : `${(100 * probability).toFixed(1)} %`].map((text) => {
      const cell = document.createElement("td");
      cell.textContent = text;
      return cell;
    }));
    return row;
  }
}
