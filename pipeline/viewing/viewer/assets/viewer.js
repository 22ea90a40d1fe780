// Connects the slide, its layers and the tools with the controls, the keys and the address.

import { Address } from "./address.js";
import { Compare } from "./compare.js";
import { Controls } from "./controls.js";
import { Corrections } from "./corrections.js";
import { dataUrl } from "./data.js";
import { Layers } from "./layers.js";
import { Measures } from "./measures.js";
import { announce, note } from "./notices.js";
import { cleared, Outlines } from "./outlines.js";
import { download, pictureOf } from "./picture.js";
import { Pointer } from "./pointer.js";
import { distance, magnification, nice } from "./readout.js";
import { RegionTable } from "./region_table.js";
import { Selection } from "./selection.js";
import { Stage } from "./stage.js";

const MAGNIFICATIONS = { q: 5, w: 10, e: 20, r: 40 };
const QUARTER = 90;
const byId = (id) => document.getElementById(id);

const response = await fetch(dataUrl("facts.json"));
if (!response.ok) {
  note(await response.text());
  throw new Error("no facts");
}
const facts = await response.json();
const controls = new Controls(facts);
const classesOn = () => controls.state.classes.map((c) => c.on);
const stage = new Stage(byId("stage"), facts, true);
const { osd } = stage;
const canvases = ["left-out", "outlines", "corrected", "measures"].map(byId);
osd.canvas.append(...canvases); // above the slide, below the navigator
const outlines = new Outlines(byId("outlines"), facts);
const leftOut = facts.left_out && new Outlines(byId("left-out"), { ...facts, classes: facts.left_out }, "left-out/");
const drawn = [outlines, leftOut].filter(Boolean);
const pointer = new Pointer(stage, facts, drawn, classesOn);
const selection = new Selection(facts, outlines, stage, classesOn);
const corrections = new Corrections(facts, outlines, selection, stage);
const table = new RegionTable(facts, outlines, selection, classesOn);
const measures = new Measures(facts, stage, pointer);
const compare = new Compare(stage, facts);
const layers = new Layers(stage, facts, outlines, leftOut);
const address = new Address(stage, controls);

let redrawing = 0;
// OpenSeadragon drops a redraw that is requested while it draws, so request the frame here.
function redraw() {
  redrawing ||= requestAnimationFrame(() => { redrawing = 0; drawShapes(stage.view()); });
}
for (const polygons of drawn) {
  polygons.changed = () => {
    byId("loading").hidden = !drawn.some(({ loading, opacity }) => loading && opacity);
    redraw();
  };
}
measures.changed = redraw;
outlines.failed = (what) => showFailure(`The ${what} cannot be read. The terminal shows the reason. Reload the page to try again.`);
if (leftOut) leftOut.failed = () => showFailure("The left-out areas cannot be read. The terminal shows the reason. Reload the page to try again.");
pointer.probe.failed = showFailure;
layers.failed = showFailure;
for (const id of ["export-regions", "export-corrections"]) byId(id).addEventListener("click", () => showFailure());
selection.changed = () => {
  corrections.render();
  table.follow();
};
corrections.changed = () => table.render();
controls.changed = () => {
  layers.apply(controls.state);
  table.update();
  address.write();
};

osd.addOnceHandler("open", () => {
  osd.canvas.setAttribute("role", "application");
  osd.canvas.setAttribute("aria-label", `Slide ${facts.name}: arrow keys move, plus and minus zoom, question mark shows all keys`);
  osd.canvas.setAttribute("aria-describedby", "place values");
  osd.navigator?.element.setAttribute("aria-hidden", "true");
  for (const focusable of osd.navigator?.element.querySelectorAll("[tabindex]") ?? []) focusable.tabIndex = -1;
  if (osd.navigator) osd.navigator.element.tabIndex = -1;
  address.read();
  layers.apply(controls.state);
  osd.addHandler("update-viewport", draw);
  osd.addHandler("viewport-change", () => address.write());
  osd.addHandler("resize", () => osd.forceRedraw());
  osd.addHandler("animation-finish", () => { corrections.refresh(); selection.refresh(); });
  osd.addHandler("rotate", ({ degrees }) => showTurn(degrees));
  showTurn(osd.viewport.getRotation());
  draw();
  corrections.start();
  checkIdentity();
  if (facts.slide.overview !== null) awaitOverview();
});
osd.addHandler("canvas-click", (event) => {
  if (!event.quick || pointer.fingers) return;
  const position = [event.position.x, event.position.y];
  if (measures.kind) {
    measures.click(position);
    return;
  }
  pointer.clicked(position, event.originalEvent.pointerType);
  selection.pick(stage.placeAt(...position), event.shift);
});
osd.addOnceHandler("tile-load-failed", () => {
  showFailure("Parts of the slide or of its classes cannot be shown. Check in the terminal that wsi-view is still running, then reload the page.");
});

window.addEventListener("hashchange", () => { address.read(); layers.apply(controls.state); table.update(); });

// Drawing over the slide

function drawShapes(view) {
  for (const polygons of drawn) polygons.draw(view);
  const [context, ratio] = cleared(byId("corrected"), view);
  for (const regions of [corrections, selection]) regions.draw(context, view, ratio);
  measures.draw(view);
}

function draw() {
  const view = stage.view();
  drawShapes(view);
  const bar = nice((150 / view.zoom) * facts.mpp);
  byId("scale-line").style.width = `${(bar / facts.mpp) * view.zoom}px`;
  byId("scale-text").textContent = distance(bar);
  pointer.draw(view);
}

// Shows the overview while it is read, until it is complete.
async function awaitOverview() {
  const notice = note("This slide contains no overview, so wsi-view reads the whole slide to make one. You can zoom in anywhere in the meantime.", "status");
  const bar = document.createElement("progress");
  bar.setAttribute("aria-label", "Share of the slide that has been read");
  notice.append(bar);
  for (let share = 0; share < 1; await new Promise((done) => setTimeout(done, 500))) {
    const answer = await fetch(dataUrl("overview.json")).catch(() => null);
    const progress = answer?.ok ? await answer.json() : { share, failed: true };
    if (progress.failed) {
      notice.remove();
      showFailure("The overview of this slide cannot be read. The terminal shows the reason. You can still zoom in.");
      return;
    }
    bar.value = share = progress.share;
    if (share === 1 || share - stage.overviewShown > 0.1) for (const one of [stage, compare]) one.showOverview(share);
  }
  notice.remove();
}

let refusal = null; // the note with the server's reason for refusing requests for this result

// Shows a text about something that cannot be loaded, or instead why the server does not answer about this result.
async function showFailure(text) {
  const answer = refusal ? null : await fetch(dataUrl("facts.json")).catch(() => null);
  const reason = answer && !answer.ok ? await answer.text() : "";
  if (reason) refusal ??= note(reason);
  if (text && !refusal) note(text);
}

async function checkIdentity() {
  const answer = await fetch(dataUrl("identity.json"));
  if (answer.ok && (await answer.json()).same === false) {
    note("This file differs from the slide that was segmented. The classes shown may not belong to it.");
  }
}

// Tools

function magnify(times) {
  const zoom = stage.zoomOf(times);
  if (zoom === null) announce(`This slide is too coarse for ${times}×`);
  else {
    stage.zoomTo(zoom);
    announce(`${times}×`);
  }
}

for (const button of document.querySelectorAll("[data-magnification]")) {
  const times = Number(button.dataset.magnification);
  button.disabled = stage.zoomOf(times) === null;
  if (button.disabled) button.title = `This slide is too coarse for ${times}×`;
  button.addEventListener("click", () => magnify(times));
}

function showTurn(degrees) {
  byId("turn").valueAsNumber = degrees;
  byId("turn-text").textContent = `${Math.round(degrees)}°`;
  osd.forceRedraw();
}

// Waits until the whole view is drawn, then downloads it.
async function savePicture() {
  const items = () => Array.from({ length: osd.world.getItemCount() }, (_, i) => osd.world.getItemAt(i));
  const missing = () => osd.isAnimating() || items().some((item) => item.getOpacity() && !item.getFullyLoaded())
    || drawn.some((polygons) => polygons.opacity && !(polygons.front?.final && polygons.covers(polygons.front, stage.view(), 1.001)));
  const end = performance.now() + 10000;
  while (missing() && performance.now() < end) await new Promise((done) => setTimeout(done, 100));
  const view = stage.view();
  const place = `x${Math.round(view.x)} y${Math.round(view.y)} ${magnification(view.zoom, facts.mpp)}`;
  await download(pictureOf(stage, canvases, controls.legend()), `${facts.name.replaceAll("/", " ")} ${place}.png`);
  announce(missing() ? "Picture saved. Parts of the view were still loading." : "Picture saved");
}

byId("zoom-in").addEventListener("click", () => stage.zoomBy(1.5));
byId("zoom-out").addEventListener("click", () => stage.zoomBy(1 / 1.5));
byId("home").addEventListener("click", () => stage.home());
byId("turn").addEventListener("input", (event) => stage.turn(event.target.valueAsNumber));
byId("save-picture").addEventListener("click", savePicture);
byId("help-button").addEventListener("click", () => byId("help").showModal());
byId("slides")?.addEventListener("change", ({ target }) => {
  const { value } = target;
  target.value = [...target.options].find((one) => one.defaultSelected).value; // in case the person stays
  location.href = `/slides/${value}/`;
});

// Keys

const keys = {
  ArrowLeft: (e) => stage.moveBy(-1, 0, e.shiftKey), ArrowRight: (e) => stage.moveBy(1, 0, e.shiftKey),
  ArrowUp: (e) => stage.moveBy(0, -1, e.shiftKey), ArrowDown: (e) => stage.moveBy(0, 1, e.shiftKey),
  "+": () => stage.zoomBy(1.5), "=": () => stage.zoomBy(1.5), "-": () => stage.zoomBy(1 / 1.5), "−": () => stage.zoomBy(1 / 1.5),
  0: () => stage.home(),
  f: () => stage.zoomTo(1 / window.devicePixelRatio),
  t: () => stage.turnBy(QUARTER), T: () => stage.turnBy(-QUARTER),
  i: () => pointer.announceCenter(), l: () => address.copy(), v: savePicture, s: () => compare.turn(),
  m: () => announce(controls.toggle("map")), o: () => announce(controls.toggle("outlines")),
  p: () => announce(controls.toggle("probability")),
  u: () => announce(controls.toggle("unfamiliar")), x: () => announce(controls.toggle("left-out")),
  h: () => announce(controls.hideAll()),
  n: () => selection.next("area"), N: () => selection.next("uncertainty"), g: () => table.turn(!table.on),
  Escape: () => selection.clear(),
  "[": () => announce(controls.stronger(-0.1)), "]": () => announce(controls.stronger(0.1)),
  "?": () => byId("help").showModal(),
};
for (const [key, times] of Object.entries(MAGNIFICATIONS)) keys[key] = () => magnify(times);
const REPEATED = ["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "+", "=", "-", "−", "[", "]"]; // while they are held

document.addEventListener("keydown", (event) => {
  // Windows reports AltGr as Ctrl and Alt. Some keyboards need it for [ and ].
  const commands = (event.ctrlKey || event.altKey) && !event.getModifierState("AltGraph");
  if (commands || event.metaKey || byId("help").open) return;
  // Sliders and lists use the arrow keys themselves, and buttons and links Enter and Space.
  if (event.target.matches("select, input[type=range]") && /^(Arrow|Home|End|Page)/.test(event.key)) return;
  if (event.target.matches("button, a, summary, input") && /^( |Enter)$/.test(event.key)) return;
  if (event.target.matches("select")) return;
  const key = keyOf(event);
  const action = measures.key(key) ?? corrections.key(key) ?? keyAction(key);
  if (!action) return;
  event.preventDefault();
  if (!event.repeat || REPEATED.includes(key)) action(event);
});

// Returns the key without Caps Lock.
function keyOf({ key, shiftKey }) {
  if (key.length > 1) return key;
  return shiftKey ? key.toUpperCase() : key.toLowerCase();
}

function keyAction(key) {
  return /^[1-9]$/.test(key) ? () => announce(controls.toggleClass(Number(key) - 1)) : keys[key];
}

// For tests and the console.
window.wsiView = { stage, osd, outlines, leftOut, pointer, corrections, selection, table, measures, compare, controls, view: () => stage.view() };
