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
    this.first = 0; // the number of the first row that is shown
    byId("table-on").addEventListener("change", (event) => this.turn(event.target.checked));
    for (const button of this.heads()) button.addEventListener("click", () => this.sort(button.dataset.by));
    byId("rows-before").addEventListener("click", () => this.show(this.first - ROWS));
    byId("rows-after").addEventListener("click", () => this.show(this.first + ROWS));
    outlines.measured = () => this.show(this.first);
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
  follow() { this.show(this.first, this.selection.last?.index ?? null); }

  async show(first, holding = null) {
    if (!this.on) return;
    const question = { what: "rows", by: this.by, upward: this.upward, on: this.classesOn(), first: Math.max(0, first), count: ROWS, holding };
    this.asked = question;
    const page = await this.outlines.request(question);
    if (this.asked !== question) return;
    this.first = page.first;
    this.render(page);
  }

  render({ rows, first, total }) {
    const selected = new Set(this.selection.numbers());
    const focused = document.activeElement?.closest("#rows tr")?.dataset.index;
    byId("rows").replaceChildren(...rows.map((row) => this.row(row, selected.has(row.index))));
    byId("rows").querySelector(`tr[data-index="${focused}"] button`)?.focus();
    byId("rows-shown").textContent = total ? `${whole.format(first + 1)}–${whole.format(first + rows.length)} of ${whole.format(total)}` : "no regions";
    byId("rows-before").disabled = first === 0;
    byId("rows-after").disabled = first + rows.length >= total;
    for (const button of this.heads()) {
      const sorted = this.upward ? "ascending" : "descending";
      button.closest("th").setAttribute("aria-sort", button.dataset.by === this.by ? sorted : "none");
    }
  }

  row({ index, label, area_mm2, probability }, selected) {
    const { name, color } = this.facts.classes[label - 1];
    const row = document.createElement("tr");
    row.dataset.index = index;
    row.addEventListener("click", (event) => this.selection.go(index, event.shiftKey));
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-pressed", String(selected));
    button.append(swatchOf(color), ` ${name}`);
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
