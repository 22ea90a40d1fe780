// Fetches, draws and looks up the polygons in a worker, so that no frame of the page waits for them.
//
// Messages in: {kind: "begin", base, facts}, {kind: "draw", id, view, ratio, on} (only the latest is drawn), {kind: "find",
// id, x, y, on}, {kind: "request", id, what, ...} (see Outlines.request). Out: {kind: "drawn", id, bitmap, ms, final},
// {kind: "found", id, found}, {kind: "answered", id, answer}; {kind: "begun"}, then {kind: "loaded"} or {kind: "unloaded"}
// for a level of detail; {kind: "measured"} or {kind: "unmeasured"} for the uncertainty of the regions.

import { describe, readPolygons, smallestAt } from "./polygons.js";
import { nextRegion, regionRows } from "./region_orders.js";

const MOST_POINTS = 3000; // in one path; messages are processed between paths
const MOST_ERROR_PX = 0.6;
const DOT_PX = 2; // smaller polygons become dots
const BLOB_PX = 7; // smaller polygons are filled, because their outlines would overlap
const CROWD = 30000; // with more polygons than this in view, CROWDED_BLOB_PX replaces BLOB_PX
const CROWDED_BLOB_PX = 16; // drawing outlines takes most of the time
const BUSY_MS = 15;
const CASING = "rgba(255, 255, 255, 0.75)";
const THIN_UM_PER_PX = 5; // coarser than 2×: a single thin line, because wide ones would hide the tissue

let facts = null;
let base = "";
let details = []; // the polygons of each level of detail; null until they are loaded
const asked = new Set();
let latest = null; // the drawing that was requested last
let drawing = false;

self.onmessage = ({ data }) => {
  if (data.kind === "begin") {
    ({ facts, base } = data);
    details = facts.tolerances.map(() => null);
  } else if (data.kind === "draw") {
    latest = data;
    if (!drawing) drawLatest();
  } else if (data.kind === "find") {
    postMessage({ kind: "found", id: data.id, found: find(data) });
  } else if (data.kind === "request") {
    answer(data);
  }
};

// Lets pending messages be processed. A timer would wait longer.
const channel = new MessageChannel();
const pause = () => new Promise((done) => { channel.port1.onmessage = done; channel.port2.postMessage(null); });

async function drawLatest() {
  drawing = true;
  while (latest) {
    const wish = latest;
    const started = performance.now();
    const wanted = wantedDetail(wish.view.zoom);
    const detail = nearestDetail(wanted);
    if (detail === null) {
      if (latest === wish) latest = null; // the page asks again after "loaded"
      continue;
    }
    const { view, ratio } = wish;
    const canvas = new OffscreenCanvas(Math.max(1, Math.round(view.width * ratio)), Math.max(1, Math.round(view.height * ratio)));
    const steps = drawSteps(canvas.getContext("2d"), view, ratio, details[detail], wish.on);
    let paused = performance.now();
    let done = false;
    while (!done && latest === wish) {
      done = steps.next().done;
      if (performance.now() - paused > BUSY_MS) {
        await pause();
        paused = performance.now();
      }
    }
    if (!done || latest !== wish) continue;
    latest = null;
    const bitmap = canvas.transferToImageBitmap();
    postMessage({ kind: "drawn", id: wish.id, bitmap, ms: performance.now() - started, final: detail === wanted }, [bitmap]);
  }
  drawing = false;
}

// Returns the coarsest level of detail that looks the same at this zoom, and starts to load it if necessary.
function wantedDetail(zoom) {
  const wanted = Math.max(0, facts.tolerances.findLastIndex((tolerance) => tolerance * zoom <= MOST_ERROR_PX));
  if (!asked.has(wanted)) {
    asked.add(wanted);
    load(wanted);
  }
  return wanted;
}

function nearestDetail(wanted) {
  const here = details.flatMap((polygons, d) => (polygons ? [d] : []));
  return here.length ? here.reduce((a, b) => (Math.abs(b - wanted) < Math.abs(a - wanted) ? b : a)) : null;
}

// Returns what `parse` makes of the bytes of a file, or null if the file cannot be read.
async function read(file, parse) {
  try {
    const response = await fetch(base + file);
    return response.ok ? parse(await response.arrayBuffer()) : null;
  } catch {
    return null;
  }
}

async function load(detail) {
  postMessage({ kind: "begun" });
  loading += 1;
  details[detail] = await read(`outlines/${detail}`, (bytes) => readPolygons(bytes, Math.max(facts.width, facts.height)));
  loading -= 1;
  for (const done of waiting.splice(0)) done();
  postMessage({ kind: details[detail] ? "loaded" : "unloaded" });
}

let loading = 0; // levels of detail that are being loaded
const waiting = []; // requests that came before the first polygons
const NOTHING = { at: null, regions: [], next: null, rows: { rows: [], first: 0, total: 0 } }; // answers if no level can be read

async function answer(question) {
  const { id, what, zoom = 1 } = question;
  while (nearestDetail(wantedDetail(zoom)) === null && loading) await new Promise((done) => { waiting.push(done); });
  const polygons = details[nearestDetail(wantedDetail(zoom))];
  const answers = {
    at: () => find(question),
    regions: () => question.indices.map((index) => describe(polygons, index)),
    next: async () => nextRegion(polygons, question.by === "uncertainty" ? await measured() : null, question),
    rows: async () => {
      const pending = measured();
      return regionRows(polygons, question.by === "probability" ? await pending : uncertainty, question);
    },
  };
  postMessage({ kind: "answered", id, answer: polygons ? await answers[what]() : NOTHING[what] });
}

let uncertainty = null; // of each region, once it is known
let measuring = null;

// Returns the uncertainty of each region, or null if it cannot be read.
function measured() {
  measuring ??= (async () => {
    uncertainty = await read("uncertainty", (bytes) => new Float32Array(bytes));
    postMessage({ kind: uncertainty ? "measured" : "unmeasured" });
    return uncertainty;
  })();
  return measuring;
}

// Returns the smallest polygon that contains a place, or null if there is none.
function find({ x, y, on, zoom }) {
  const detail = nearestDetail(wantedDetail(zoom));
  if (detail === null) return null;
  const index = smallestAt(details[detail], x, y, on);
  return index === null ? null : { ...describe(details[detail], index), detail };
}

function addRing(path, { xy, firstPoint }, ring, { k, x, y }) {
  const first = firstPoint[ring];
  path.moveTo(xy[2 * first] * k + x, xy[2 * first + 1] * k + y);
  for (let p = first + 1; p < firstPoint[ring + 1] - 1; p++) path.lineTo(xy[2 * p] * k + x, xy[2 * p + 1] * k + y);
  path.closePath();
}

// Draws the polygons in view. Yields before every new path.
function* drawSteps(context, view, ratio, polygons, on) {
  context.lineJoin = "bevel";
  const k = view.zoom * ratio;
  const toScreen = { k, x: (view.width / 2) * ratio - view.x * k, y: (view.height / 2) * ratio - view.y * k };
  const [halfWidth, halfHeight] = [view.width / 2 / view.zoom, view.height / 2 / view.zoom];
  const seen = polygons.grid.within(view.x - halfWidth, view.y - halfHeight, view.x + halfWidth, view.y + halfHeight);
  const blobPx = seen.length > CROWD ? CROWDED_BLOB_PX : BLOB_PX;
  const strokes = (color) => (facts.mpp / view.zoom > THIN_UM_PER_PX ? [[color, 1]] : [[CASING, 3.6], [color, 2]]);
  let [lines, blobs, points, label] = [new Path2D(), new Path2D(), 0, 0];
  const finish = () => {
    if (!points) return;
    const { color } = facts.classes[label - 1];
    for (const [style, width] of strokes(color)) {
      context.strokeStyle = style;
      context.lineWidth = width * ratio;
      context.stroke(lines);
    }
    context.fill(blobs);
    [lines, blobs, points] = [new Path2D(), new Path2D(), 0];
  };
  for (const index of seen) {
    if (!on[polygons.label[index] - 1]) continue;
    if (polygons.label[index] !== label || points > MOST_POINTS) {
      finish();
      label = polygons.label[index];
      context.fillStyle = facts.classes[label - 1].color;
      yield;
    }
    const [left, top, right, bottom] = polygons.box.subarray(4 * index, 4 * index + 4);
    const size = Math.max(right - left, bottom - top) * view.zoom;
    const shell = polygons.firstRing[index];
    if (size < DOT_PX) {
      context.fillRect(left * k + toScreen.x, top * k + toScreen.y, DOT_PX * ratio, DOT_PX * ratio);
      points += 1;
    } else if (size < blobPx) {
      addRing(blobs, polygons, shell, toScreen);
      points += polygons.firstPoint[shell + 1] - polygons.firstPoint[shell];
    } else {
      for (let ring = shell; ring < polygons.firstRing[index + 1]; ring++) addRing(lines, polygons, ring, toScreen);
      points += polygons.firstPoint[polygons.firstRing[index + 1]] - polygons.firstPoint[shell];
    }
  }
  finish();
}
