// The grid: patches that may show one class and no other. Those that do not fit are excluded before the rest is saved.

import { answersFor, isLoaded, onFirstClick, picture, post } from "/assets/server.js";

const byId = (id) => document.getElementById(id);

export class Grid {
  // `answered()` is called when the server has sent patches, `failed(error)` if a request fails.
  constructor({ orders, answered, failed }) {
    Object.assign(this, { orders, answered, failed });
    this.state = { classes: [] }; // until the server sends its own
    this.chosen = null;
    this.patches = [];
    this.classes = []; // those when the patches were requested, as in `single.js`
    this.excluded = new Set(); // ids for the chosen class, also of patches that are not shown now
    this.turn = 0;
    this.order = null; // about the patches that are shown, while it is saved or if it could not be saved
    this.busy = false;
    onFirstClick(byId("grid-save"), () => this.save());
    byId("grid-undo").addEventListener("click", () => this.undo());
  }

  update(state) {
    this.state = state;
    const buttons = state.classes.map((one, k) => {
      const button = document.createElement("button");
      button.type = "button";
      button.setAttribute("aria-pressed", String(this.chosen === one.id));
      const swatch = document.createElement("span");
      swatch.className = "swatch";
      swatch.style.background = one.color;
      button.append(swatch, one.name);
      if (k < 9) {
        const key = document.createElement("kbd");
        key.textContent = String(k + 1);
        button.append(" ", key);
      }
      button.addEventListener("click", () => this.choose(k));
      return button;
    });
    const focused = [...byId("grid-classes").children].indexOf(document.activeElement);
    byId("grid-classes").replaceChildren(...buttons);
    if (focused >= 0) buttons[focused]?.focus();
  }

  choose(k) {
    const one = this.state.classes[k];
    if (!one) return;
    if (one.id !== this.chosen) this.excluded.clear();
    this.chosen = one.id;
    this.update(this.state);
    this.load();
  }

  // Asks until the patches are compared. Another choice ends the wait.
  async load() {
    const turn = ++this.turn;
    this.show([]);
    this.classes = this.state.classes;
    const name = this.classes.find(({ id }) => id === this.chosen)?.name;
    if (name === undefined) {
      byId("grid-about").textContent = "Choose a class.";
      return;
    }
    byId("grid-about").textContent = "Comparing patches…";
    try {
      for (;;) {
        const { missing, of, patches, why } = await post("/grid", { class_id: this.chosen });
        if (turn !== this.turn) return;
        if (!missing) {
          this.answered();
          this.show(patches);
          byId("grid-about").textContent = this.patches.length
            ? `Do these patches show ${name} and no other class? Click those that do not, then save the rest.` : why;
          return;
        }
        byId("grid-about").textContent = `Comparing patches: ${of - missing} of ${of}`;
        await new Promise((resolve) => setTimeout(resolve, 400));
      }
    } catch (error) {
      if (turn === this.turn) byId("grid-about").textContent = "Patches could not be compared. Choose a class.";
      this.failed(error);
    }
  }

  show(found) {
    // Those whose label is not saved yet are not asked for again.
    const sent = this.orders.patches();
    const patches = found.filter(({ id }) => !sent.has(id));
    this.patches = patches;
    this.order = null;
    this.shownAt = performance.now();
    const buttons = patches.map((patch, i) => {
      const button = document.createElement("button");
      button.type = "button";
      button.setAttribute("aria-pressed", String(this.excluded.has(patch.id)));
      button.setAttribute("aria-label", `Exclude patch ${i + 1} of ${patch.slide}`);
      const image = picture(patch, "patch");
      image.alt = "";
      image.onerror = () => {
        image.alt = "not loaded";
        this.failed(new Error("Some pictures cannot be loaded. Their patches will not be saved."));
      };
      button.append(image);
      button.addEventListener("click", () => this.toggle(patch.id, button));
      return button;
    });
    byId("patches").replaceChildren(...buttons);
    byId("grid-save").disabled = this.busy || !patches.length;
    buttons[0]?.focus({ preventScroll: true });
  }

  toggle(id, button) {
    if (this.busy) return;
    const on = !this.excluded.has(id);
    if (on) this.excluded.add(id);
    else this.excluded.delete(id);
    button.setAttribute("aria-pressed", String(on));
  }

  // Moves the focus among the patches.
  move(key) {
    const buttons = [...byId("patches").children];
    const at = buttons.indexOf(document.activeElement);
    if (at < 0) return false;
    const columns = getComputedStyle(byId("patches")).gridTemplateColumns.split(" ").length;
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[key];
    buttons[at + step]?.focus();
    return true;
  }

  async save() {
    if (!this.patches.length || this.busy) return;
    const images = byId("patches").querySelectorAll("img");
    const rest = this.patches.filter(({ id }, i) => !this.excluded.has(id) && isLoaded(images[i]));
    const excluded = this.patches.map(({ id }) => id).filter((id) => this.excluded.has(id));
    if (!rest.length && !excluded.length) {
      this.failed(new Error("NOT saved: no picture is loaded."));
      return;
    }
    const seconds = Math.min(86400, (performance.now() - this.shownAt) / 1000 / Math.max(1, rest.length));
    const answers = answersFor(this.classes, new Set([this.chosen]));
    const labels = rest.map(({ id, reason }) => ({
      patch: id, answers, mark: "none", view: "grid", reason, suggested: null, seconds,
    }));
    const said = `Saved: ${rest.length} patches`;
    await this.wait(async () => {
      const { turn } = this;
      const about = byId("grid-about").textContent;
      byId("grid-about").textContent = "Saving…";
      // Patches that could not be saved keep their place in the queue.
      const order = this.orders.put({ labels, excluded, said }, this.order);
      this.order = order;
      this.orders.send();
      const saved = await order.settled;
      if (!saved && turn === this.turn) byId("grid-about").textContent = about;
      return saved;
    });
  }

  async undo() {
    await this.wait(() => this.orders.undo());
  }

  // Does something that ends with a request. Until then, what is marked cannot be changed. `change` returns whether
  // other patches are to be shown.
  async wait(change) {
    if (this.busy) return;
    this.setBusy(true);
    const changed = await change();
    this.setBusy(false);
    if (changed) await this.load();
  }

  setBusy(busy) {
    this.busy = busy;
    byId("patches").setAttribute("aria-busy", String(busy)); // not inert, which would take the focus away
    byId("grid-save").disabled = busy || !this.patches.length;
  }
}
