// Connects the slide and its layers in OpenSeadragon with the controls, the outlines and the address.
//
// Places are level-0 pixels of the result's frame. A view is {x, y, zoom}: the place at its center, and CSS pixels per
// level-0 pixel.

import { Controls } from "./controls.js";
import { Corrections } from "./corrections.js";
import { Outlines } from "./outlines.js";
import { area, distance, nice, place } from "./readout.js";

const OpenSeadragon = window.OpenSeadragon;
const SMALLEST_LINK_DELAY_MS = 200;
const byId = (id) => document.getElementById(id);

const response = await fetch("facts.json");
if (!response.ok) {
  note(await response.text());
  throw new Error("no facts");
}
const facts = await response.json();
let overviewShown = 0; // share of the overview that was read when its tiles were last requested
const controls = new Controls(facts);
const stage = byId("stage");
const osd = new OpenSeadragon({
  element: stage,
  drawer: "canvas",
  tileSources: slideSource(),
  showNavigationControl: false,
  showNavigator: true,
  navigatorPosition: "TOP_RIGHT",
  navigatorSizeRatio: 0.16,
  navigatorAutoFade: false,
  navigatorBackground: "#ffffff",
  navigatorOpacity: 1,
  gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
  gestureSettingsTouch: { pinchRotate: false },
  animationTime: 0.4,
  springStiffness: 10,
  zoomPerScroll: 1.3,
  maxZoomPixelRatio: 8,
  minZoomImageRatio: 0.7,
  visibilityRatio: 0.3,
  imageLoaderLimit: 6,
  timeout: 120000, // long enough for slow disks: OpenSeadragon does not request a tile again after a timeout
  maxImageCacheCount: 600,
  // Semitransparent tiles that overlap by a fraction of a pixel would show seams.
  subPixelRoundingForTransparency: { "*": OpenSeadragon.SUBPIXEL_ROUNDING_OCCURRENCES.ALWAYS },
});
osd.canvas.append(byId("left-out"), byId("outlines"), byId("corrected")); // above the slide, below the navigator
const outlines = new Outlines(byId("outlines"), facts);
const leftOut = facts.left_out && new Outlines(byId("left-out"), { ...facts, classes: facts.left_out }, "left-out/");
const drawn = [outlines, leftOut].filter(Boolean);
let redrawing = 0;
for (const polygons of drawn) {
  // OpenSeadragon drops a redraw that is requested while it draws, so request the frame here.
  polygons.changed = () => {
    redrawing ||= requestAnimationFrame(() => { redrawing = 0; drawPolygons(view()); });
  };
}
outlines.failed = () => note("The outlines cannot be read. The terminal shows the reason. Reload the page to try again.");
if (leftOut) leftOut.failed = () => note("The left-out areas cannot be read. The terminal shows the reason. Reload the page to try again.");
const corrections = new Corrections(facts, outlines, {
  view, goTo: (place) => goTo(place, false), announce, note, classesOn: () => controls.state.classes.map((c) => c.on),
});
const layers = { labels: null, classes: [], unfamiliar: null };
let labelsShown = 0;

osd.addOnceHandler("open", async () => {
  osd.canvas.setAttribute("role", "application");
  osd.canvas.setAttribute("aria-label", `Slide ${facts.name}: arrow keys move, plus and minus zoom, question mark shows all keys`);
  osd.canvas.setAttribute("aria-describedby", "place");
  osd.navigator?.element.setAttribute("aria-hidden", "true");
  for (const focusable of osd.navigator?.element.querySelectorAll("[tabindex]") ?? []) focusable.tabIndex = -1;
  if (osd.navigator) osd.navigator.element.tabIndex = -1;
  readAddress(true);
  applyLayers();
  osd.addHandler("update-viewport", draw);
  osd.addHandler("viewport-change", () => {
    writeAddress();
    if (!pointer && !byId("tip").hidden) pointAt(null); // the polygon has moved away
  });
  osd.addHandler("resize", () => osd.forceRedraw());
  osd.addHandler("animation-finish", () => corrections.refresh());
  draw();
  corrections.start();
  checkIdentity();
  if (facts.slide.overview !== null) awaitOverview();
});
osd.addHandler("canvas-press", () => { dragging = true; });
osd.addHandler("canvas-release", () => { dragging = false; });
osd.addHandler("canvas-key", (event) => { event.preventDefaultAction = true; });
osd.addHandler("canvas-click", (event) => {
  if (!event.quick) return;
  pointAt(event.position.x, event.position.y);
  corrections.pick(...placeAt(event.position.x, event.position.y));
});
osd.addOnceHandler("tile-load-failed", () => {
  note("Parts of the slide or of its classes cannot be shown. Check in the terminal that wsi-view is still running, then reload the page.");
});
controls.changed = () => { applyLayers(); writeAddress(); };

function pyramid(width, height, { tile, levels }, url) {
  return {
    width, height, tileWidth: tile, tileHeight: tile, tileOverlap: 0, minLevel: 0, maxLevel: levels - 1,
    getTileUrl: (level, x, y) => url(levels - 1 - level, x, y),
  };
}

function slideSource() {
  return pyramid(facts.width, facts.height, facts.slide, (z, x, y) => {
    const made = facts.slide.overview !== null && z >= facts.slide.overview;
    return made ? `overview/${z}/${x}_${y}.jpg?read=${overviewShown}` : `slide/${z}/${x}_${y}.jpg`;
  });
}

function view() {
  const bounds = osd.viewport.getBounds(true);
  const size = osd.viewport.getContainerSize();
  const zoom = size.x / (bounds.width * facts.width);
  return {
    x: (bounds.x + bounds.width / 2) * facts.width, y: (bounds.y + bounds.height / 2) * facts.width, zoom,
    width: size.x, height: size.y,
  };
}

function goTo({ x, y, zoom }, immediately) {
  const size = osd.viewport.getContainerSize();
  osd.viewport.zoomTo((zoom * facts.width) / size.x, null, immediately);
  osd.viewport.panTo(new OpenSeadragon.Point(x / facts.width, y / facts.width), immediately);
}

function placeAt(screenX, screenY) {
  const v = view();
  return [v.x + (screenX - v.width / 2) / v.zoom, v.y + (screenY - v.height / 2) / v.zoom];
}

// Layers

function overlay(url, opacity) {
  const { width, height, l0_per_px } = facts.map;
  return new Promise((done) => osd.addTiledImage({
    tileSource: pyramid(width, height, facts.map, url),
    x: 0, y: 0, width: (width * l0_per_px) / facts.width,
    opacity,
    // Tiles of a hidden layer are not requested.
    preload: false,
    success: ({ item }) => done(item),
    error: () => done(null),
  }));
}

// Lays a picture over the slide, from its origin.
function picture(url, l0PerPx, opacity) {
  return new Promise((done) => osd.addTiledImage({
    tileSource: { type: "image", url, buildPyramid: false },
    x: 0, y: 0, opacity,
    success: ({ item }) => {
      item.setWidth((item.source.dimensions.x * l0PerPx) / facts.width, true);
      done(item);
    },
    error: () => done(null),
  }));
}

async function applyLayers() {
  const state = controls.state;
  const shown = state.classes.reduce((bits, c, k) => (c.on ? bits | (1n << BigInt(k)) : bits), 0n);
  await showLabels(shown, state.map.on && shown ? state.map.opacity : 0);
  for (const [k, c] of state.classes.entries()) {
    const opacity = state.probability.on && c.on ? c.opacity : 0;
    if (opacity && !layers.classes[k]) {
      layers.classes[k] = overlay((z, x, y) => `class/${k}/${z}/${x}_${y}.png`, opacity);
    }
    (await layers.classes[k])?.setOpacity(opacity);
  }
  const unfamiliar = state.unfamiliar.on ? state.unfamiliar.opacity : 0;
  if (unfamiliar) layers.unfamiliar ??= picture("familiarity.png", facts.familiarity.l0_per_px, unfamiliar);
  (await layers.unfamiliar)?.setOpacity(unfamiliar);
  outlines.show(state.outlines.on ? state.outlines.opacity : 0, state.classes.map((c) => c.on));
  leftOut?.show(state["left-out"].on ? state["left-out"].opacity : 0, facts.left_out.map(() => true));
}

async function showLabels(shown, opacity) {
  if (opacity && (!layers.labels || shown !== labelsShown)) {
    const old = layers.labels;
    labelsShown = shown;
    layers.labels = overlay((z, x, y) => `labels/${shown}/${z}/${x}_${y}.png`, opacity);
    const gone = await old;
    if (gone) osd.world.removeItem(gone);
  }
  (await layers.labels)?.setOpacity(opacity);
}

// Drawing over the slide

function drawPolygons(v) { for (const polygons of [...drawn, corrections]) polygons.draw(v); }

function draw() {
  const v = view();
  drawPolygons(v);
  const bar = nice(150 / v.zoom * facts.mpp);
  byId("scale-line").style.width = `${(bar / facts.mpp) * v.zoom}px`;
  byId("scale-text").textContent = distance(bar);
  byId("place").textContent = place(pointer ? placeAt(...pointer) : [v.x, v.y], v.zoom, facts.mpp);
  if (pointer && !dragging) pointAt(...pointer);
}

// The polygons under the pointer

let pointer = null;
let dragging = false; // no lookups while dragging: they would delay every frame
osd.canvas.addEventListener("pointermove", (event) => {
  if (event.pointerType === "touch") return;
  const box = stage.getBoundingClientRect();
  pointer = [event.clientX - box.left, event.clientY - box.top];
  byId("place").textContent = place(placeAt(...pointer), view().zoom, facts.mpp);
  if (!event.buttons) pointAt(...pointer);
});
osd.canvas.addEventListener("pointerleave", (event) => {
  if (event.pointerType === "touch") return; // comes after every tap
  pointer = null;
  pointAt(null);
});

let tipAt = [0, 0];
const awaited = new Set(); // those whose answer is to be announced
function pointAt(screenX, screenY) {
  tipAt = [screenX, screenY];
  const [x, y] = screenX === null ? [] : placeAt(screenX, screenY);
  for (const polygons of drawn) polygons.find(screenX === null ? null : { x, y, zoom: view().zoom });
}

for (const polygons of drawn) {
  polygons.pointed = () => {
    showTip();
    if (awaited.delete(polygons) && !awaited.size) announceFound();
  };
}

// Returns the texts about the polygons that were found, each with its color.
function foundTexts() {
  return drawn.filter(({ seen }) => seen).map(({ seen, facts: { classes } }) => {
    const { name, color } = classes[seen.label - 1];
    return { name, color, size: area(seen.area_mm2) };
  });
}

function showTip() {
  const tip = byId("tip");
  const texts = foundTexts();
  tip.hidden = !texts.length;
  if (tip.hidden) return;
  tip.replaceChildren(...texts.map(({ name, color, size }) => {
    const line = document.createElement("div");
    const swatch = document.createElement("span");
    swatch.className = "swatch";
    swatch.style.background = color;
    line.append(swatch, ` ${name} · ${size}`);
    return line;
  }));
  const [x, y] = tipAt;
  const left = Math.min(x + 14, stage.clientWidth - tip.offsetWidth - 4);
  const top = y + 18 + tip.offsetHeight < stage.clientHeight ? y + 18 : y - 10 - tip.offsetHeight;
  tip.style.transform = `translate(${Math.max(4, left)}px, ${Math.max(4, top)}px)`;
}

function announceCenter() {
  const v = view();
  tipAt = [v.width / 2, v.height / 2];
  for (const polygons of drawn) awaited.add(polygons);
  // Use the classes of the controls, because the layers may still be loading.
  outlines.find({ x: v.x, y: v.y, zoom: v.zoom, always: true, on: controls.state.classes.map((c) => c.on) });
  leftOut?.find({ x: v.x, y: v.y, zoom: v.zoom });
}

function announceFound() {
  const v = view();
  const texts = foundTexts().map(({ name, size }) => `${name}, ${size}`);
  if (!outlines.seen) texts.unshift("no class");
  announce(`${texts.join("; ")}, at ${place([v.x, v.y], v.zoom, facts.mpp)}`);
}

function announce(text) { byId("announcement").textContent = text; }

function note(text, role = "alert") {
  const paragraph = document.createElement("p");
  paragraph.setAttribute("role", role);
  paragraph.textContent = text;
  byId("notes").append(paragraph);
  return paragraph;
}

// Shows the overview while it is read, until it is complete.
async function awaitOverview() {
  const notice = note("This slide contains no overview, so wsi-view reads the whole slide to make one. You can zoom in anywhere in the meantime.", "status");
  const bar = document.createElement("progress");
  bar.setAttribute("aria-label", "Share of the slide that has been read");
  notice.append(bar);
  for (let share = 0; share < 1; await new Promise((done) => setTimeout(done, 500))) {
    const answer = await fetch("overview.json").catch(() => null);
    const progress = answer?.ok ? await answer.json() : { share, failed: true };
    if (progress.failed) {
      notice.remove();
      note("The overview of this slide cannot be read. The terminal shows the reason. You can still zoom in.");
      return;
    }
    bar.value = share = progress.share;
    if (share === 1 || share - overviewShown > 0.1) {
      overviewShown = share;
      // The tile addresses have changed, so replace the whole image.
      osd.addTiledImage({ tileSource: slideSource(), index: 0, replace: true });
    }
  }
  notice.remove();
}

async function checkIdentity() {
  const answer = await fetch("identity.json");
  if (answer.ok && (await answer.json()).same === false) {
    note("This file differs from the slide that was segmented. The classes shown may not belong to it.");
  }
}

// The address: a link to this view and its layers

let writing = 0;
function writeAddress() {
  clearTimeout(writing);
  writing = setTimeout(() => {
    const v = view();
    const digits = Math.max(0, Math.ceil(Math.log10(v.zoom)) + 1);
    const words = [`x=${v.x.toFixed(digits)}`, `y=${v.y.toFixed(digits)}`, `zoom=${v.zoom.toPrecision(4)}`, ...controls.words()];
    history.replaceState(null, "", `#${words.join("&")}`);
  }, SMALLEST_LINK_DELAY_MS);
}

function readAddress(immediately) {
  const words = new URLSearchParams(location.hash.slice(1));
  controls.read(words);
  const wanted = { x: Number(words.get("x")), y: Number(words.get("y")), zoom: Number(words.get("zoom")) };
  if (words.has("x") && Object.values(wanted).every(Number.isFinite) && wanted.zoom > 0) goTo(wanted, immediately);
}

window.addEventListener("hashchange", () => { readAddress(true); applyLayers(); });

async function copyLink() {
  await navigator.clipboard.writeText(location.href);
  announce("Link copied");
  byId("link").textContent = "Copied";
  setTimeout(() => { byId("link").textContent = "Copy link"; }, 1500);
}

// Buttons and keys

const zoomBy = (factor) => { osd.viewport.zoomBy(factor); osd.viewport.applyConstraints(); };
const home = () => osd.viewport.goHome();
function moveBy(dx, dy, little) {
  const bounds = osd.viewport.getBounds();
  const step = little ? 0.05 : 0.25;
  osd.viewport.panBy(new OpenSeadragon.Point(dx * step * bounds.width, dy * step * bounds.height));
  osd.viewport.applyConstraints();
}

byId("zoom-in").addEventListener("click", () => zoomBy(1.5));
byId("zoom-out").addEventListener("click", () => zoomBy(1 / 1.5));
byId("home").addEventListener("click", home);
byId("link").addEventListener("click", copyLink);
byId("help-button").addEventListener("click", () => byId("help").showModal());
byId("slides")?.addEventListener("change", (event) => { location.href = `/slides/${event.target.value}/`; });

const keys = {
  ArrowLeft: (e) => moveBy(-1, 0, e.shiftKey), ArrowRight: (e) => moveBy(1, 0, e.shiftKey),
  ArrowUp: (e) => moveBy(0, -1, e.shiftKey), ArrowDown: (e) => moveBy(0, 1, e.shiftKey),
  "+": () => zoomBy(1.5), "=": () => zoomBy(1.5), "-": () => zoomBy(1 / 1.5), "−": () => zoomBy(1 / 1.5),
  0: home,
  f: () => goTo({ ...view(), zoom: 1 / window.devicePixelRatio }, false),
  i: announceCenter, l: copyLink,
  m: () => controls.toggle("map"), o: () => controls.toggle("outlines"), p: () => controls.toggle("probability"),
  u: () => controls.toggle("unfamiliar"), x: () => controls.toggle("left-out"),
  h: () => controls.hideAll(),
  "[": () => controls.stronger(-0.1), "]": () => controls.stronger(0.1),
  "?": () => byId("help").showModal(),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || byId("help").open) return;
  // Sliders and lists use the arrow keys themselves.
  if (event.target.matches("select, input[type=range]") && /^(Arrow|Home|End|Page)/.test(event.key)) return;
  if (event.target.matches("select")) return;
  const action = corrections.key(event.key) ?? keyAction(event.key);
  if (!action) return;
  event.preventDefault();
  action(event);
});

function keyAction(key) {
  return /^[1-9]$/.test(key) ? () => controls.toggleClass(Number(key) - 1) : keys[key];
}

// For tests and the console.
window.wsiView = { osd, outlines, leftOut, corrections, view, controls };
