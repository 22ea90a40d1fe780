// Shows the class map, the probabilities and the other layers as the controls state. They lie over the slide in this order,
// whichever is turned on first.

import { dataUrl } from "./data.js";
import { pyramid } from "./stage.js";

export class Layers {
  constructor(stage, facts, outlines, leftOut) {
    Object.assign(this, { stage, facts, outlines, leftOut });
    this.labels = null; // the layers, or the promises of them
    this.labelsShown = 0;
    this.classes = [];
    this.unfamiliar = null;
    this.failed = () => {}; // called with a text about what cannot be loaded
    this.ranks = new WeakMap(); // layer -> its place in the order
  }

  async apply(state) {
    const shown = state.classes.reduce((bits, c, k) => (c.on ? bits | (1n << BigInt(k)) : bits), 0n);
    await this.showLabels(shown, state.map.on && shown ? state.map.opacity : 0);
    for (const [k, c] of state.classes.entries()) {
      const opacity = state.probability.on && c.on ? c.opacity : 0;
      if (opacity && !this.classes[k]) {
        this.classes[k] = this.overlay(1 + k, (z, x, y) => dataUrl(`class/${k}/${z}/${x}_${y}.png`), opacity);
      }
      (await this.classes[k])?.setOpacity(opacity);
    }
    const unfamiliar = state.unfamiliar.on ? state.unfamiliar.opacity : 0;
    if (unfamiliar) this.unfamiliar ??= this.picture(dataUrl("familiarity.png"), this.facts.familiarity.l0_per_px, unfamiliar);
    (await this.unfamiliar)?.setOpacity(unfamiliar);
    this.outlines.show(state.outlines.on ? state.outlines.opacity : 0, state.classes.map((c) => c.on));
    this.leftOut?.show(state["left-out"].on ? state["left-out"].opacity : 0, this.facts.left_out.map(() => true));
  }

  async showLabels(shown, opacity) {
    if (opacity && (!this.labels || shown !== this.labelsShown)) {
      const old = this.labels;
      this.labelsShown = shown;
      this.labels = this.overlay(0, (z, x, y) => dataUrl(`labels/${shown}/${z}/${x}_${y}.png`), opacity);
      const gone = await old;
      if (gone) this.stage.osd.world.removeItem(gone);
    }
    (await this.labels)?.setOpacity(opacity);
  }

  overlay(rank, url, opacity) {
    const { width, height, l0_per_px } = this.facts.map;
    return this.added(rank, {
      tileSource: pyramid(width, height, this.facts.map, url),
      width: (width * l0_per_px) / this.facts.width,
      opacity,
      // Tiles of a hidden layer are not requested.
      preload: false,
    });
  }

  // Lays a picture over the slide, from its origin.
  async picture(url, l0PerPx, opacity) {
    const item = await this.added(1 + this.facts.classes.length, { tileSource: { type: "image", url, buildPyramid: false }, opacity });
    if (item) item.setWidth((item.source.dimensions.x * l0PerPx) / this.facts.width, true);
    else this.failed("The tissue unlike the training data cannot be shown. Check familiarity.png in the folder of the result, then reload the page.");
    return item;
  }

  async added(rank, options) {
    const { osd } = this.stage;
    const item = await new Promise((done) => osd.addTiledImage({
      x: 0, y: 0, ...options, success: (event) => done(event.item), error: () => done(null),
    }));
    if (!item) return null;
    this.ranks.set(item, rank);
    const items = Array.from({ length: osd.world.getItemCount() }, (_, i) => osd.world.getItemAt(i));
    osd.world.setItemIndex(item, items.filter((other) => (this.ranks.get(other) ?? -1) < rank).length);
    return item;
  }
}
