// Keeps the page's address a link to this view and its layers.

import { announce } from "./notices.js";

const byId = (id) => document.getElementById(id);
const SMALLEST_DELAY_MS = 200;

export class Address {
  constructor(stage, controls) {
    Object.assign(this, { stage, controls });
    this.writing = 0;
    byId("link").addEventListener("click", () => this.copy());
  }

  // Writes soon: browsers limit how often the address can change.
  write() {
    clearTimeout(this.writing);
    this.writing = setTimeout(() => this.writeNow(), SMALLEST_DELAY_MS);
  }

  writeNow() {
    const v = this.stage.view(false);
    const digits = Math.max(0, Math.ceil(Math.log10(v.zoom)) + 1);
    const words = [`x=${v.x.toFixed(digits)}`, `y=${v.y.toFixed(digits)}`, `zoom=${v.zoom.toPrecision(4)}`];
    if (v.degrees) words.push(`turn=${Number(v.degrees.toFixed(1))}`);
    history.replaceState(null, "", `#${[...words, ...this.controls.words()].join("&")}`);
  }

  read() {
    const words = new URLSearchParams(location.hash.slice(1));
    this.controls.read(words);
    const number = (name) => Number(words.get(name) ?? 0);
    const wanted = { x: number("x"), y: number("y"), zoom: number("zoom"), degrees: number("turn") };
    if (!words.has("x") || !Object.values(wanted).every(Number.isFinite) || wanted.zoom <= 0) return;
    this.stage.goNear(wanted); // people edit addresses
  }

  async copy() {
    this.writeNow();
    const copied = await navigator.clipboard.writeText(location.href).then(() => true, () => false);
    announce(copied ? "Link copied" : "The browser did not allow copying. Copy the link from the address bar");
    byId("link").textContent = copied ? "Copied" : "Copy from the address bar";
    setTimeout(() => { byId("link").textContent = "Copy link"; }, 1500);
  }
}
