// Holds which layers and classes are shown, and keeps the panel's controls in step with that state.

const byId = (id) => document.getElementById(id);
const LAYERS = ["map", "outlines", "probability"];
const LAYERS_OF_SOME = { unfamiliar: "familiarity", "left-out": "left_out" }; // layers that need a fact of the slide
const LAYER_NAMES = {
  map: "Class map", outlines: "Outlines", probability: "Probabilities", unfamiliar: "Unlike the training data",
  "left-out": "Areas beside the tissue",
};
const bounded = (value) => Math.min(1, Math.max(0, Math.round(value * 100) / 100));

export class Controls {
  // `state` is {map, outlines, probability, …: {on, opacity}, classes: [{on, opacity}]}. The opacity of a class is that of
  // its probability layer.
  constructor(facts) {
    this.facts = facts;
    this.layers = [...LAYERS, ...Object.keys(LAYERS_OF_SOME).filter((layer) => facts[LAYERS_OF_SOME[layer]])];
    this.changed = () => {};
    this.hidden = null;
    this.state = this.defaults();
    for (const layer of this.layers) {
      this.join(byId(`${layer}-on`), "checked", () => this.state[layer], "on");
      this.join(byId(`${layer}-opacity`), "valueAsNumber", () => this.state[layer], "opacity");
    }
    for (const k of facts.classes.keys()) {
      const of = (kind) => document.querySelector(`.${kind}[data-class="${k}"]`);
      of("swatch").style.setProperty("--class", facts.classes[k].color);
      this.join(of("class-on"), "checked", () => this.state.classes[k], "on");
      this.join(of("class-opacity"), "valueAsNumber", () => this.state.classes[k], "opacity");
    }
    for (const swatch of document.querySelectorAll(".swatch[data-kind]")) {
      swatch.style.setProperty("--class", facts.left_out.find(({ name }) => name === swatch.dataset.kind)?.color ?? "transparent");
    }
    byId("unfamiliar-swatch")?.style.setProperty("--class", facts.familiarity.color);
    if (window.matchMedia("(max-width: 44em)").matches) byId("panel-details").open = false;
    this.render();
  }

  defaults() {
    return {
      map: { on: true, opacity: 0.45 }, outlines: { on: true, opacity: 1 }, probability: { on: false, opacity: 1 },
      unfamiliar: { on: false, opacity: 0.8 }, "left-out": { on: false, opacity: 1 },
      classes: this.facts.classes.map(() => ({ on: true, opacity: 0.7 })),
    };
  }

  join(input, property, target, name) {
    input?.addEventListener("input", () => {
      target()[name] = input[property];
      this.hidden = null;
      this.update();
    });
  }

  update() {
    this.render();
    this.changed();
  }

  render() {
    const { on, opacity } = this.state.map;
    document.documentElement.style.setProperty("--map-opacity", on ? opacity : 1); // swatches look like the fills
    for (const layer of this.layers) {
      byId(`${layer}-on`).checked = this.state[layer].on;
      const slider = byId(`${layer}-opacity`);
      if (slider) slider.valueAsNumber = this.state[layer].opacity;
    }
    for (const [k, c] of this.state.classes.entries()) {
      document.querySelector(`.class-on[data-class="${k}"]`).checked = c.on;
      const slider = document.querySelector(`.class-opacity[data-class="${k}"]`);
      slider.valueAsNumber = c.opacity;
      slider.hidden = !this.state.probability.on;
    }
  }

  // Returns {name, color, fill} of everything that is shown with a color of its own.
  legend() {
    const of = (name, swatch, color) => ({ name, color, fill: getComputedStyle(swatch).backgroundColor });
    const shown = ["map", "outlines", "probability"].some((layer) => this.state[layer].on);
    const entries = this.facts.classes.flatMap(({ name, color }, k) => (
      shown && this.state.classes[k].on ? [of(name, document.querySelector(`.swatch[data-class="${k}"]`), color)] : []));
    if (this.state.unfamiliar.on) entries.push(of("unlike the training data", byId("unfamiliar-swatch"), this.facts.familiarity.color));
    if (!this.state["left-out"].on) return entries;
    const kinds = [...document.querySelectorAll(".swatch[data-kind]")].map((swatch) => (
      of(swatch.dataset.kind, swatch, swatch.style.getPropertyValue("--class"))));
    return [...entries, ...kinds];
  }

  // For keys: this and the next methods return what to announce.
  toggle(layer) {
    if (!this.layers.includes(layer)) return "";
    const state = this.state[layer];
    state.on = !state.on;
    this.hidden = null;
    this.update();
    return `${LAYER_NAMES[layer]} ${state.on ? "on" : "off"}`;
  }

  toggleClass(k) {
    const c = this.state.classes[k];
    if (!c) return "";
    c.on = !c.on;
    this.update();
    return `${this.facts.classes[k].name} ${c.on ? "on" : "off"}`;
  }

  hideAll() {
    if (this.hidden) {
      for (const layer of this.hidden) this.state[layer].on = true;
      this.hidden = null;
    } else {
      this.hidden = this.layers.filter((layer) => this.state[layer].on);
      for (const layer of this.layers) this.state[layer].on = false;
    }
    this.update();
    const on = this.layers.filter((layer) => this.state[layer].on).map((layer) => LAYER_NAMES[layer]);
    return on.length ? `${on.join(", ")} on` : "All layers off";
  }

  stronger(step) {
    for (const part of [this.state.map, ...this.state.classes]) part.opacity = bounded(part.opacity + step);
    this.update();
    return `Opacity of the class map ${Math.round(100 * this.state.map.opacity)} %`;
  }

  // Returns the state as parameters of the page's address: map=0.35&outlines=1&probability=0&off=0,2&p1=0.5
  words() {
    const words = ["map", "outlines"].map((layer) => `${layer}=${this.state[layer].on ? this.state[layer].opacity : 0}`);
    words.push(`probability=${this.state.probability.on ? 1 : 0}`);
    for (const layer of Object.keys(LAYERS_OF_SOME)) {
      if (this.state[layer].on) words.push(`${layer}=${this.state[layer].opacity}`);
    }
    const off = this.state.classes.flatMap((c, k) => (c.on ? [] : [k]));
    if (off.length) words.push(`off=${off.join(",")}`);
    const usual = this.defaults().classes;
    for (const [k, c] of this.state.classes.entries()) {
      if (c.opacity !== usual[k].opacity) words.push(`p${k}=${c.opacity}`);
    }
    return words;
  }

  // Sets the state from the parameters of an address; missing parameters get their defaults.
  read(words) {
    const number = (name, usual) => {
      const value = Number.parseFloat(words.get(name));
      return Number.isFinite(value) ? bounded(value) : usual;
    };
    const state = this.defaults();
    for (const layer of this.layers) {
      const value = number(layer, state[layer].on ? state[layer].opacity : 0);
      state[layer].on = value > 0;
      if (value > 0) state[layer].opacity = value;
    }
    const off = new Set((words.get("off") ?? "").split(",").filter(Boolean).map(Number));
    for (const [k, c] of state.classes.entries()) {
      c.on = !off.has(k);
      c.opacity = number(`p${k}`, c.opacity);
    }
    this.state = state;
    this.hidden = null;
    this.render();
  }
}

// Returns a swatch: with the outline of a color, filled as the map shows it over tissue, or with the color itself.
export function swatchOf(color, filled = true) {
  const swatch = document.createElement("span");
  swatch.className = filled ? "swatch" : "swatch line";
  swatch.style.setProperty("--class", color);
  return swatch;
}
