// Follows the pointer: shows its position, the values of the map there, and the polygons there.

import { swatchOf } from "./controls.js";
import { announce } from "./notices.js";
import { Probe } from "./probe.js";
import { area, place } from "./readout.js";
import { placeOf } from "./views.js";

const byId = (id) => document.getElementById(id);

export class Pointer {
  // `drawn` has the outlines first, then the other polygons. `classesOn` returns which classes are shown.
  constructor(stage, facts, drawn, classesOn) {
    Object.assign(this, { stage, facts, drawn, classesOn });
    this.position = null; // of the mouse or pen on the screen, until a tap
    this.tapped = null; // the level-0 place that was tapped last, until the view moves
    this.dragging = false; // no lookups while dragging: they would delay every frame
    // Whether more than one finger touches the slide, or did before the last one left. A palm that the system does not
    // reject counts as a finger. Its size is not a reliable sign: on some devices, a flat finger reports the size of a palm, and
    // a palm begins as a small contact. Neither is a long rest: people hold one finger before they pinch with another.
    this.fingers = false;
    this.resting = false; // no tip while another tool takes the clicks
    this.tipAt = [0, 0];
    this.awaited = new Set(); // the polygons whose answer is to be announced
    this.probe = new Probe(facts, showValues);
    for (const polygons of drawn) {
      polygons.pointed = () => {
        this.showTip();
        if (this.awaited.delete(polygons) && !this.awaited.size) this.announceFound();
      };
    }
    const { osd } = stage;
    osd.canvas.addEventListener("pointerdown", (event) => { this.fingers = !event.isPrimary; });
    osd.canvas.addEventListener("pointercancel", () => { this.dragging = false; });
    osd.canvas.addEventListener("pointermove", (event) => this.moved(event));
    osd.canvas.addEventListener("pointerleave", (event) => this.left(event));
    osd.addHandler("canvas-press", () => { this.dragging = true; });
    osd.addHandler("canvas-release", () => { this.dragging = false; });
    osd.addHandler("viewport-change", () => this.viewMoved());
    osd.addHandler("animation-finish", () => this.probe.at(this.place()));
  }

  // Returns the level-0 place that the page describes: under the mouse, tapped, or at the center of the view.
  place(view = this.stage.view()) {
    if (this.position) return placeOf(view, this.position);
    return this.tapped ?? [view.x, view.y];
  }

  moved(event) {
    if (event.pointerType === "touch") return;
    this.position = this.stage.positionOf(event);
    const view = this.stage.view();
    this.describe(view);
    if (event.buttons) return;
    this.probe.at(this.place(view));
    this.find(this.position);
  }

  left(event) {
    if (event.pointerType === "touch" || !this.position) return; // comes after every tap
    this.position = null;
    this.find(null);
    this.describe(this.stage.view());
    this.probe.at(this.place());
  }

  // Shows what lies where the slide was clicked or tapped, with a finger or a pen also if the mouse is elsewhere.
  clicked(position, device) {
    if (device !== "mouse") this.position = null;
    if (!this.position) this.tapped = this.stage.placeAt(...position);
    this.find(position);
    this.describe(this.stage.view());
    this.probe.at(this.place());
  }

  viewMoved() {
    this.probe.wait(); // until the view rests
    if (this.position) return;
    this.tapped = null;
    if (!byId("tip").hidden) this.find(null); // the polygon has moved away
  }

  // Draws the readout for a view. Called for every frame of the slide.
  draw(view) {
    this.describe(view);
    if (this.position && !this.dragging) this.find(this.position);
  }

  describe(view) {
    const what = this.position || this.tapped ? "" : "center: ";
    byId("place").textContent = what + place(this.place(view), view.zoom, this.facts.mpp);
  }

  find(position) {
    const at = this.resting ? null : position;
    this.tipAt = at;
    const view = this.stage.view();
    const [x, y] = at ? placeOf(view, at) : [];
    for (const polygons of this.drawn) polygons.find(at && { x, y, zoom: view.zoom });
  }

  // Returns the texts about the polygons that were found, each with its color.
  foundTexts() {
    return this.drawn.filter(({ seen }) => seen).map((polygons) => {
      const { label, area_mm2 } = polygons.seen;
      const { name, color } = polygons.facts.classes[label - 1];
      return { name, color, filled: polygons === this.drawn[0], size: area(area_mm2) };
    });
  }

  showTip() {
    const tip = byId("tip");
    const texts = this.foundTexts();
    tip.hidden = !texts.length || !this.tipAt;
    if (tip.hidden) return;
    tip.replaceChildren(...texts.map(({ name, color, filled, size }) => {
      const line = document.createElement("div");
      line.append(swatchOf(color, filled), ` ${name} · ${size}`);
      return line;
    }));
    const [x, y] = this.tipAt;
    const { clientWidth, clientHeight } = this.stage.element;
    const left = Math.min(x + 14, clientWidth - tip.offsetWidth - 4);
    const top = y + 18 + tip.offsetHeight < clientHeight ? y + 18 : y - 10 - tip.offsetHeight;
    tip.style.transform = `translate(${Math.max(4, left)}px, ${Math.max(4, top)}px)`;
  }

  announceCenter() {
    const view = this.stage.view();
    this.tipAt = [view.width / 2, view.height / 2];
    for (const polygons of this.drawn) this.awaited.add(polygons);
    const [outlines, ...others] = this.drawn;
    // Use the classes of the controls, because the layers may still be loading.
    outlines.find({ x: view.x, y: view.y, zoom: view.zoom, always: true, on: this.classesOn() });
    for (const polygons of others) polygons.find({ x: view.x, y: view.y, zoom: view.zoom });
  }

  async announceFound() {
    const view = this.stage.view();
    const texts = this.foundTexts().map(({ name, size }) => `${name}, ${size}`);
    if (!this.drawn[0].seen) texts.unshift("no class");
    const pixel = this.probe.pixelAt([view.x, view.y]);
    const values = pixel ? await this.probe.read(pixel) : "";
    const map = values && `; map: ${values}`;
    announce(`${texts.join("; ")}, at ${place([view.x, view.y], view.zoom, this.facts.mpp)}${map}`);
  }
}

function showValues(text) {
  byId("values").setAttribute("aria-busy", String(text === null));
  if (text !== null) byId("values").textContent = text;
}
