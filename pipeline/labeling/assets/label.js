// Joins both views, the keys and the progress.

import { Grid } from "/assets/grid.js";
import { Orders } from "/assets/orders.js";
import { state as loadState } from "/assets/server.js";
import { Single } from "/assets/single.js";

const byId = (id) => document.getElementById(id);

function failed(error) {
  // The same text again would be announced again, as often as labels are sent again.
  if (byId("fault").textContent !== error.message) byId("fault").textContent = error.message;
  byId("fault").hidden = false;
  byId("saved").textContent = "";
}

function announce(text) {
  byId("announcement").textContent = text;
  if (text.startsWith("Saved") || text === "Undone") byId("saved").textContent = text;
}

function working(text) {
  byId("saved").textContent = text;
}

function rows(id, pairs) {
  byId(id).replaceChildren(...pairs.map(([name, value, color]) => {
    const row = document.createElement("div");
    const term = document.createElement("dt");
    const number = document.createElement("dd");
    term.textContent = name;
    number.textContent = String(value);
    if (color) {
      const swatch = document.createElement("span");
      swatch.className = "swatch";
      swatch.style.background = color;
      term.prepend(swatch, " ");
    }
    row.append(term, number);
    return row;
  }));
}

function progress(state) {
  const { counts } = state;
  rows("counts", [
    ["Labeled patches", counts.labeled], ["Incomplete or disputed", counts.incomplete], ["Unsure", counts.unsure],
    ["Artifact", counts.artifact],
    ["Your median time per label", state.seconds === null ? "–" : `${state.seconds.toFixed(1)} s`],
    ["Annotator", state.annotator],
  ]);
  rows("by-class", state.classes.map(({ name, present, color }) => [name, present, color]));
  const slides = state.slides.map(({ name, labeled, patches }) => [name, `${labeled} of ${patches}`]);
  if (state.opening) slides.push([`${state.opening} not opened yet`, ""]);
  rows("by-slide", slides);
}

function place(patch) {
  const [image, marker] = [byId("thumbnail"), byId("marker")];
  image.hidden = marker.hidden = !patch;
  byId("slide-name").textContent = patch?.slide ?? "";
  if (!patch) return;
  if (image.dataset.slide !== patch.digest) {
    image.src = `/patches/${patch.id}/slide.jpg`;
    image.dataset.slide = patch.digest;
  }
  const [left, top, width, height] = patch.at.map((share) => `${share * 100}%`);
  Object.assign(marker.style, { left, top, width, height });
}

// The server answers: labels that could not be saved are sent again.
function answered() {
  byId("fault").hidden = true;
  orders.send();
}

function done(state) {
  orders.last = state.last;
  orders.session ??= state.session;
  answered();
  single.update(state);
  grid.update(state);
  progress(state);
}

const orders = new Orders({ done, failed, announce, working });
const single = new Single({ orders, failed, announce });
const grid = new Grid({ orders, answered, failed });
const show = single.show.bind(single);
single.show = (patch) => {
  show(patch);
  place(patch);
};

function view(name) {
  byId("single").hidden = name !== "single";
  byId("grid").hidden = name !== "grid";
  for (const one of ["single", "grid"]) byId(`view-${one}`).setAttribute("aria-pressed", String(one === name));
  if (name === "grid" && grid.chosen !== null) grid.load();
}

byId("view-single").addEventListener("click", () => view("single"));
byId("view-grid").addEventListener("click", () => view("grid"));
byId("help-button").addEventListener("click", () => byId("help").showModal());

const isGrid = () => !byId("grid").hidden;

const KEYS = {
  Enter: () => (isGrid() ? grid.save() : single.save("none")),
  Backspace: () => isGrid() || single.back(),
  u: () => isGrid() || single.save("unsure"),
  a: () => isGrid() || single.save("artifact"),
  z: () => (isGrid() ? grid : orders).undo(),
  s: () => isGrid() || single.suggest(),
  g: () => view(isGrid() ? "single" : "grid"),
  "?": () => byId("help").showModal(),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || byId("help").open) return;
  if (isGrid() && event.key.startsWith("Arrow") && grid.move(event.key)) {
    event.preventDefault();
    return;
  }
  // Enter on a button that the user has moved to presses that button, except on the classes and patches.
  const focused = document.activeElement;
  const isControl = focused?.tagName === "BUTTON" && !focused.closest("#answer, #patches, #grid-classes");
  if (event.key === "Enter" && isControl) return;
  const act = /^[1-9]$/.test(event.key)
    ? () => (isGrid() ? grid : single)[isGrid() ? "choose" : "toggle"](Number(event.key) - 1)
    : KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!act || event.repeat) return;
  event.preventDefault();
  act();
});

window.wsiLabel = { orders, single, grid };
try {
  const first = await loadState();
  done({ ...first, undone: [] });
} catch (error) {
  failed(error);
}

// Labels that are not saved are lost with the page.
window.addEventListener("beforeunload", (event) => {
  if (orders.pending.length) event.preventDefault();
});

// A button that was clicked with the mouse does not keep the focus: Enter means "save" again.
document.addEventListener("click", (event) => {
  if (event.detail > 0 && event.target.closest("#actions, .row, #views")) document.activeElement?.blur();
});
