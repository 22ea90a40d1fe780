// The view of one patch: which classes are marked, and saving.

import { answersFor, isLoaded, onFirstClick, Pictures, post } from "/assets/server.js";

const byId = (id) => document.getElementById(id);

export class Single {
  // `failed(error)` is called if a request fails, and `announce(text)` for screen readers.
  constructor({ orders, failed, announce }) {
    Object.assign(this, { orders, failed, announce });
    this.pictures = new Pictures();
    this.state = { classes: [], upcoming: [], history: [] }; // until the server sends its own
    this.patch = null;
    this.classes = []; // those when the patch was shown: answers are for these, even if classes are merged meanwhile
    this.present = new Set();
    this.suggested = null;
    this.steps = 0; // back in the history
    this.touched = false; // whether something was marked since the patch was shown
    for (const [id, act] of Object.entries({
      back: () => this.back(), undo: () => this.orders.undo(), suggest: () => this.suggest(),
    })) byId(id).addEventListener("click", act);
    for (const [id, mark] of Object.entries({ save: "none", unsure: "unsure", artifact: "artifact" })) {
      onFirstClick(byId(id), () => this.save(mark));
    }
  }

  // Shows the next patch of a state, or the one that was undone.
  update(state) {
    this.state = state;
    const history = this.history();
    this.pictures.keep([...state.undone.slice(0, 1), ...state.upcoming, ...history.slice(0, 3)]);
    const place = this.steps ? history.findIndex(({ id }) => id === this.patch.id) : -1;
    const wanted = state.undone[0] ?? this.next();
    if (!state.undone.length && (place >= 0 || (wanted && wanted.id === this.patch?.id) || this.isBegun(wanted))) {
      // The user already works on this patch: keep what is marked.
      this.steps = place + 1;
      if (!byId("stage").querySelector(".patch")) this.renderPicture(); // it could not be loaded
      this.renderAnswer();
    } else {
      this.steps = 0;
      this.show(wanted);
    }
  }

  // Returns whether to keep the patch that is shown although another one is `wanted` now: the server was started again, or
  // another person has labeled the patch. If it were replaced, the next key would label a patch that nobody has looked at.
  isBegun(wanted) {
    if (!this.patch || this.state.history.some(({ id }) => id === this.patch.id)) return false;
    return this.touched || !["again", "excluded"].includes(wanted?.reason);
  }

  // Returns the labeled patches, the latest first. Those whose label is not saved yet come before the others.
  history() {
    const pending = this.orders.pending.flatMap(({ patch }) => patch ?? []); // none for a grid
    const all = [...pending.reverse(), ...this.state.history];
    return all.filter(({ id }, i) => all.findIndex((one) => one.id === id) === i);
  }

  // Returns the next patch whose label is not on its way.
  next() {
    const sent = this.orders.patches();
    return this.state.upcoming.find(({ id }) => !sent.has(id)) ?? null;
  }

  show(patch) {
    this.patch = patch;
    this.classes = patch?.classes ?? this.state.classes;
    this.suggested = null;
    this.present = new Set(patch?.label?.present ?? []);
    this.touched = false;
    this.shownAt = performance.now();
    byId("suggestion").textContent = "";
    this.renderPicture();
    this.renderAnswer();
  }

  // Shows a text in the place of the picture.
  renderText(text) {
    byId("stage").replaceChildren(textOf(text));
  }

  renderPicture() {
    const stage = byId("stage");
    if (!this.patch) {
      if (this.orders.pending.length) this.renderText("Saving…");
      else if (this.state.opening) this.renderText("Opening the next slide…");
      else if (!this.state.slides.length) this.renderText("No slide could be opened. The terminal shows the reason.");
      else this.renderText("Nothing left: every patch of these slides has a label.");
      byId("about").textContent = "";
      return;
    }
    const { around, patch } = this.pictures.of(this.patch);
    patch.onerror = () => {
      if (!patch.isConnected) return;
      const text = "The picture of this patch cannot be loaded. Press Enter to try again, or U or A to mark the patch as unsure or as an artifact.";
      this.renderText(text);
      this.announce(text);
    };
    const share = 100 / Number(stage.dataset.context);
    Object.assign(patch.style, { left: `${(100 - share) / 2}%`, top: `${(100 - share) / 2}%`, width: `${share}%`, height: `${share}%` });
    stage.replaceChildren(around, patch);
    if (!patch.complete) {
      const wait = textOf("Loading the picture…");
      patch.onload = () => wait.remove();
      stage.append(wait);
    }
    const { micrometers, reason, blind, label } = this.patch;
    const words = [`${micrometers} µm`];
    if (blind) words.push("blind: labeled by every annotator, without suggestions");
    if (reason === "again") words.push("some classes have no answer yet");
    if (reason === "uncertain") words.push("picked because its classes are uncertain");
    if (reason === "excluded") words.push("excluded from the grid");
    if (label) words.push(label.mark === "none" ? "labeled before" : `marked as ${label.mark} before`);
    byId("about").textContent = words.join(" · ");
  }

  renderAnswer() {
    const buttons = this.classes.map(({ id, name, color }, k) => {
      const button = document.createElement("button");
      button.type = "button";
      button.setAttribute("aria-pressed", String(this.present.has(id)));
      button.disabled = !this.patch;
      const swatch = document.createElement("span");
      swatch.className = "swatch";
      swatch.style.background = color;
      button.append(swatch, name);
      if (k < 9) {
        const key = document.createElement("kbd");
        key.textContent = String(k + 1);
        button.append(" ", key);
      }
      button.addEventListener("click", () => this.toggle(k));
      return button;
    });
    const focused = [...byId("answer").children].indexOf(document.activeElement);
    byId("answer").replaceChildren(...buttons);
    if (focused >= 0) buttons[focused]?.focus();
    byId("suggest").hidden = !this.state.model;
    for (const id of ["save", "unsure", "artifact"]) byId(id).disabled = !this.patch;
    byId("suggest").disabled = !this.patch || this.patch.blind;
    // Not `disabled`, which would take the focus away at the last patch.
    byId("back").setAttribute("aria-disabled", String(this.steps >= this.history().length));
  }

  toggle(k) {
    const one = this.classes[k];
    if (!one || !this.patch) return;
    this.touched = true;
    const on = !this.present.has(one.id);
    if (on) this.present.add(one.id);
    else this.present.delete(one.id);
    this.renderAnswer();
    this.announce(`${one.name} ${on ? "present" : "absent"}`);
  }

  // Shows the next patch at once. "Saved" appears when the server has answered; if it cannot save, the patch comes back.
  async save(mark) {
    if (!this.patch || this.orders.undoing) return;
    // A patch whose picture cannot be read can still be marked. Otherwise, it would be shown again and again.
    if (mark === "none" && !isLoaded(byId("stage").querySelector(".patch"))) {
      this.renderPicture();
      this.failed(new Error("NOT saved: the picture of this patch is not loaded."));
      return;
    }
    const { patch, classes, suggested } = this;
    const marked = [...this.present];
    const answers = mark === "none" ? answersFor(classes, this.present) : {};
    const seconds = Math.min(86400, (performance.now() - this.shownAt) / 1000);
    const label = { patch: patch.id, answers, mark, view: "single", reason: patch.reason, suggested, seconds };
    const names = classes.filter(({ id }) => answers[id] === "present").map(({ name }) => name);
    const said = `Saved: ${mark === "none" ? names.join(", ") || "no class" : mark}`;
    const waiting = { ...patch, classes, label: { present: marked, mark } };
    const [first] = this.orders.pending;
    const refused = () => this.showAgain(waiting, suggested);
    // A label that could not be saved keeps its place in the queue.
    this.orders.put({ labels: [label], patch: waiting, said, refused }, first?.patch?.id === patch.id ? first : null);
    this.steps = 0;
    this.show(this.next());
    await this.orders.send();
  }

  // Shows a patch whose label could not be saved.
  showAgain(patch, suggested) {
    this.steps = this.history().findIndex(({ id }) => id === patch.id) + 1;
    this.show(patch);
    this.suggested = suggested;
  }

  back() {
    const history = this.history();
    if (this.steps >= history.length) return;
    this.show(history[this.steps]);
    this.steps += 1;
    this.renderAnswer();
    this.announce("Previous patch");
  }

  async suggest() {
    if (!this.patch || this.patch.blind || !this.state.model) return;
    const asked = this.patch;
    byId("suggestion").textContent = "Computing the suggestion…";
    try {
      const { model, suggested } = await post("/suggestion", { patch: asked.id });
      if (this.patch !== asked) return;
      this.suggested = suggested;
      const named = this.classes.filter(({ id }) => id in suggested);
      const words = named.map(({ id, name }) => `${name} ${Math.round(suggested[id] * 100)} %`);
      byId("suggestion").textContent = words.length ? `${model}: ${words.join(", ")}` : `${model} has none of these classes.`;
    } catch (error) {
      if (this.patch === asked) byId("suggestion").textContent = "";
      this.failed(error);
    }
  }
}

function textOf(text) {
  const paragraph = document.createElement("p");
  paragraph.id = "wait";
  paragraph.textContent = text;
  return paragraph;
}
