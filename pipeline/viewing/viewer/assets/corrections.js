// Corrects the classes of regions: select a region, then press the key of its right class.
//
// The server saves each correction in a file beside the result before the page shows it as saved. The result stays as it is.

import { dataUrl } from "./data.js";
import { announce, note } from "./notices.js";
import { pathOf, strokeLines } from "./outlines.js";

const UNKNOWN = "wsi-view did not answer, so it is not known whether this was saved. Check the corrected regions.";

// After a restart, wsi-view may save under another name. The server compares it before it saves.
const author = document.querySelector("meta[name=annotator]").content;

const byId = (id) => document.getElementById(id);

export class Corrections {
  constructor(facts, outlines, selection, stage) {
    Object.assign(this, { facts, outlines, selection, stage });
    this.on = false;
    this.shapes = []; // the corrected polygons
    this.saving = Promise.resolve();
    this.waiting = 0; // orders to save that are not done
    this.saved = ""; // what was saved last
    this.last = null; // the number of the correction that an undo is about, from the server
    this.changed = () => {}; // called when other regions are corrected than before
    this.notes = { read: null, save: null }; // what could not be read, and what could not be saved
    byId("correcting").addEventListener("change", (event) => this.turn(event.target.checked));
    for (const button of this.buttons()) {
      button.querySelector(".swatch").style.setProperty("--class", facts.classes[Number(button.dataset.class)].color);
      button.addEventListener("click", () => this.relabel(Number(button.dataset.class) + 1));
    }
    byId("undo-correction").addEventListener("click", () => this.undo());
    window.addEventListener("beforeunload", (event) => { if (this.waiting) event.preventDefault(); });
    this.render();
  }

  // Reads what was saved before, and again when a person returns to the page: another tab may have saved. Needs the view.
  start() {
    this.read();
    window.addEventListener("focus", () => this.read());
    document.addEventListener("visibilitychange", () => { if (!document.hidden) this.read(); });
  }

  read() { this.inTurn("read", async () => this.take(await stateOf(fetch(dataUrl("corrections.json"))))); }

  buttons() { return [...document.querySelectorAll(".relabel")]; }

  turn(on) {
    this.on = on;
    byId("correcting").checked = on;
    if (!on && byId("correction-tools").contains(document.activeElement)) byId("correcting").focus();
    byId("correction-tools").hidden = !on;
    if (on) announce("Correct regions: click a region, or press n for the next one");
    else this.selection.clear();
  }

  // Returns what a key does, or undefined if it has another meaning.
  key(key) {
    if (key === "c") return () => this.turn(!this.on);
    if (!this.on) return undefined;
    if (/^[1-9]$/.test(key)) return () => this.relabel(Number(key));
    return { z: () => this.undo(), Escape: this.selection.empty ? () => this.turn(false) : undefined }[key];
  }

  relabel(label) {
    if (!this.facts.classes[label - 1]) return;
    const chosen = this.selection.chosen();
    this.saveInTurn(async () => {
      const regions = await chosen;
      if (!regions.length) announce("First select a region");
      for (const region of regions) {
        if (this.selection.labelOf(region) === label) {
          announce(`Unchanged: ${this.selection.describe(region)}`);
          continue;
        }
        const body = { index: region.index, label: region.label, area_mm2: region.area_mm2, after: label };
        await this.save("corrections", body, () => `Saved: ${this.selection.describe(region)}`);
      }
    });
  }

  // Reads `last` only when its turn comes: an order before it may change it.
  undo() { this.saveInTurn(() => this.save("corrections/undo", { last: this.last }, saidOfUndo)); }

  // Does one thing after the other, in the order of the keys. A note states what failed, and the next thing follows.
  inTurn(kind, work) { this.saving = this.saving.then(work).catch(({ message }) => this.showFailure(kind, message)); }

  saveInTurn(work) {
    this.wait(1);
    this.inTurn("save", work);
    this.saving = this.saving.then(() => this.wait(-1));
  }

  wait(change) {
    this.waiting += change;
    this.showSaved(this.saved);
  }

  showSaved(text) {
    this.saved = text;
    byId("corrections-saved").textContent = this.waiting ? `Saving ${this.waiting}…` : text;
  }

  showFailure(kind, text) {
    this.notes[kind]?.remove();
    this.notes[kind] = text && note(text);
  }

  async save(path, body, said) {
    this.showSaved("");
    const headers = { "Content-Type": "application/json" };
    const request = fetch(dataUrl(path), { method: "POST", headers, body: JSON.stringify({ author, ...body }) });
    request.catch(() => this.read());
    const state = await stateOf(request, "NOT saved: ", UNKNOWN);
    this.showFailure("save", null);
    await this.take(state);
    this.showSaved(said(state));
    announce(said(state));
  }

  // Shows the server's state.
  async take({ author: now, corrections, others, last }) {
    this.showFailure("read", now === author ? null
      : `wsi-view now runs with --annotator ${now}, and this page was loaded with ${author}. Reload the page to save as ${now}.`);
    this.last = last;
    const corrected = new Map(corrections.map(({ index, after }) => [index, after]));
    this.selection.corrected = corrected;
    byId("correction-count").textContent = `Corrected regions: ${corrected.size}`
      + (others ? `; ${others} more belong to an earlier result` : "");
    byId("export-corrections").hidden = !corrected.size;
    this.selection.render();
    this.changed();
    await this.refresh();
  }

  // Reads the shapes again in the level of detail of this zoom.
  async refresh() {
    const indices = [...this.selection.corrected.keys()];
    this.shapes = indices.length ? await this.outlines.request({ what: "regions", indices, zoom: this.stage.view().zoom }) : [];
    this.render();
    this.outlines.changed();
  }

  render() {
    const region = this.selection.last;
    const now = region && this.selection.labelOf(region);
    for (const button of this.buttons()) {
      button.setAttribute("aria-disabled", String(!region)); // a disabled button would lose the focus
      button.setAttribute("aria-pressed", String(now === Number(button.dataset.class) + 1));
    }
  }

  // Draws the corrected regions on the context of `cleared`.
  draw(context, view, ratio) {
    for (const region of this.shapes) {
      const after = this.selection.corrected.get(region.index);
      if (after === undefined) continue;
      const path = pathOf(region, view, ratio);
      context.fillStyle = `${this.facts.classes[after - 1].color}b0`;
      context.fill(path, "evenodd");
      strokeLines(context, path, ratio, [["#000", 3], ["#fff", 1.5]]);
    }
  }
}

function saidOfUndo({ undone, elsewhere }) {
  if (elsewhere) return "NOT undone: your last correction was made in another tab. It is shown now. Press z again to undo it.";
  return undone === null ? "Nothing to undo" : "Undone";
}

// Returns the server's state. Throws an error with the text of a note if there is none: `gone` without an answer, and
// `failure` before the server's reason for refusing.
async function stateOf(request, failure = "", gone = "wsi-view has ended. Start it again, then reload the page.") {
  const answer = await request.catch(() => { throw new Error(gone); });
  if (!answer.ok) throw new Error(failure + (await answer.text().catch(() => answer.statusText)));
  // The server may have saved.
  return answer.json().catch(() => { throw new Error("The answer of wsi-view cannot be read. Reload the page to see what is saved."); });
}
