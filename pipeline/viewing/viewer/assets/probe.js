// Reads the class and the probabilities that the map stores at a place.

import { dataUrl } from "./data.js";

const MOST_SHOWN = 3;

export class Probe {
  // Calls `answered` with the text about the latest place, and with null while it is pending.
  constructor(facts, answered) {
    Object.assign(this, { facts, answered });
    this.pixel = null; // the pixel of the map that is wanted
    this.asking = false;
    this.failed = () => {}; // called if the server refuses to answer
  }

  // Marks the text as pending until the next place is known.
  wait() {
    this.pixel = undefined;
    this.answered(null);
  }

  // Asks about a level-0 place. While an answer is pending, only the latest place is kept.
  async at(place) {
    const pixel = this.pixelAt(place);
    if (String(pixel) === String(this.pixel)) return;
    this.pixel = pixel;
    this.answered(pixel ? null : "");
    if (this.asking) return;
    this.asking = true;
    for (let asked = null; this.pixel && asked !== this.pixel;) {
      asked = this.pixel;
      const text = await this.read(asked);
      if (asked === this.pixel) this.answered(text);
    }
    this.asking = false;
  }

  // Returns the pixel of the map at a place, or null beside the slide.
  pixelAt([x, y]) {
    const { width, height, map } = this.facts;
    const inside = x >= 0 && y >= 0 && x < width && y < height;
    const pixel = [x, y].map((value) => Math.floor(value / map.l0_per_px));
    return inside && pixel[0] < map.width && pixel[1] < map.height ? pixel : null;
  }

  async read(pixel) {
    const response = await fetch(dataUrl(`values/${pixel[0]}_${pixel[1]}.json`)).catch(() => null);
    if (response && !response.ok) this.failed();
    const values = response?.ok ? await response.json().catch(() => null) : null; // the answer may end early
    return values ? this.text(values) : "";
  }

  // The map stores probabilities as whole numbers up to 255. One decimal of a percentage tells all of them apart.
  text({ label, probabilities }) {
    const percent = (k) => `${this.facts.classes[k].name} ${((100 * probabilities[k]) / 255).toFixed(1)} %`;
    const others = [...probabilities.keys()].filter((k) => k !== label - 1 && probabilities[k] > 0);
    others.sort((a, b) => probabilities[b] - probabilities[a]);
    return [label ? percent(label - 1) : "no class", ...others.map(percent)].slice(0, MOST_SHOWN).join(" · ");
  }
}
