// Draws the polygons of a class or a left-out kind as outlines over the slide.
//
// A worker draws them into a picture that is larger than the view. The page moves and scales this picture with the slide
// until the next one arrives, so no frame waits for the polygons, whatever their number. Pictures are drawn upright and
// turned with the slide.

import { dataUrl } from "./data.js";
import { upright } from "./views.js";

const MARGIN = 0.25; // extra width and height of a picture on each side, as a share of the view
const OTHER_ZOOM = 1.3; // a pending picture whose zoom differs by more than this factor is replaced

export class Outlines {
  // Calls `changed` when there is something new to draw, `pointed` with the result of `find`, `measured` when the
  // probabilities of the regions have arrived, and `failed` with the name of what cannot be loaded. `folder` has the polygons, below the data of the result. `facts.classes` has the name and color of
  // each label.
  constructor(canvas, facts, folder = "") {
    this.canvas = canvas;
    this.facts = facts;
    this.changed = () => {};
    this.pointed = () => {};
    this.measured = () => {};
    this.failed = () => {};
    this.loading = 0; // levels of detail that are being loaded
    this.answers = new Map();
    this.opacity = 0;
    this.on = [];
    this.version = 0; // counts changes of the shown classes
    this.front = null; // {bitmap, view, version, final}
    this.wish = null; // {id, view, version, ratio} of the picture being drawn
    this.asked = 0;
    this.drawings = 0;
    this.seen = null; // the polygon under the pointer
    this.drawnMs = 0; // duration of the last drawing, for measurements
    this.worker = new Worker("/assets/outline_worker.js", { type: "module" });
    this.worker.onmessage = ({ data }) => this[data.kind](data);
    this.worker.postMessage({ kind: "begin", facts, base: new URL(dataUrl(folder), location.href).pathname });
  }

  show(opacity, on) {
    this.opacity = opacity;
    this.canvas.style.opacity = opacity;
    if (String(on) !== String(this.on)) {
      this.on = on;
      this.version += 1;
    }
    this.changed();
  }

  // Looks up the polygon at a place if outlines are shown or `place.always` is set. Reports null for no polygon.
  find(place) {
    this.asked += 1;
    if (place && (this.opacity || place.always)) this.worker.postMessage({ kind: "find", id: this.asked, on: this.on, ...place });
    else this.found({ id: this.asked, found: null });
  }

  // Returns what the worker answers: {what: "at", x, y, zoom, on} a polygon or null; {what: "regions", indices, zoom} the
  // polygons with these numbers; {what: "next", by, after, on, skip} the next number by "area" or "uncertainty", or null;
  // {what: "rows", by, upward, on, first, count, holding} rows of the table of regions (see region_orders.js).
  request(question) {
    const id = this.answers.size ? Math.max(...this.answers.keys()) + 1 : 1;
    this.worker.postMessage({ kind: "request", id, ...question });
    return new Promise((done) => this.answers.set(id, done));
  }

  // Draws the outlines for a view. Called for every frame of the slide.
  draw(view) {
    const [context, ratio] = cleared(this.canvas, view);
    if (!this.opacity) return;
    if (this.front) {
      const { bitmap, view: drawn } = this.front;
      const scale = (view.zoom / drawn.zoom) * (ratio / this.front.ratio);
      const still = Math.abs(scale - 1) < 1e-6 && !view.degrees;
      const x = ((drawn.x - drawn.width / 2 / drawn.zoom - view.x) * view.zoom + view.width / 2) * ratio;
      const y = ((drawn.y - drawn.height / 2 / drawn.zoom - view.y) * view.zoom + view.height / 2) * ratio;
      if (still) context.drawImage(bitmap, Math.round(x), Math.round(y)); // whole pixels: copied without interpolation
      else context.drawImage(bitmap, x, y, bitmap.width * scale, bitmap.height * scale);
    }
    if (this.seen) drawFound(context, view, ratio, this.seen, this.facts.classes);
    if (!this.covers(this.front, view, 1 + 1e-6) && !this.covers(this.wish, view, OTHER_ZOOM)) this.ask(upright(view), ratio);
  }

  covers(picture, turnedView, zoom) {
    const view = upright(turnedView);
    if (!picture || picture.version !== this.version) return false;
    if (picture.ratio !== (window.devicePixelRatio || 1)) return false; // the window has moved to another screen
    const drawn = picture.view;
    if (Math.max(view.zoom / drawn.zoom, drawn.zoom / view.zoom) > zoom) return false;
    const inside = (axis, side) => Math.abs(view[axis] - drawn[axis]) * view.zoom + view[side] / 2 <= drawn[side] / 2 * zoom + 0.5;
    return inside("x", "width") && inside("y", "height");
  }

  ask(view, ratio) {
    const large = { ...view, width: view.width * (1 + 2 * MARGIN), height: view.height * (1 + 2 * MARGIN) };
    this.wish = { id: ++this.drawings, view: large, version: this.version, ratio };
    this.worker.postMessage({ kind: "draw", id: this.wish.id, view: large, ratio, on: this.on });
  }

  // Messages from the worker

  drawn({ id, bitmap, ms, final }) {
    if (id !== this.wish?.id) return bitmap.close();
    this.front?.bitmap.close();
    this.front = { ...this.wish, bitmap, final };
    this.wish = null;
    this.drawnMs = ms;
    return this.changed();
  }

  begun() {
    this.loading += 1;
    this.changed();
  }

  unloaded() {
    this.loading -= 1;
    this.failed("outlines");
    this.changed();
  }

  unmeasured() { this.failed("probabilities of the regions"); }

  loaded() {
    this.loading -= 1;
    if (this.front && !this.front.final) this.front.version = -1; // a better level of detail may have arrived
    this.wish = null;
    this.changed();
  }

  answered({ id, answer }) {
    this.answers.get(id)?.(answer);
    this.answers.delete(id);
  }

  found({ id, found }) {
    if (id !== this.asked) return;
    const same = found?.index === this.seen?.index && found?.detail === this.seen?.detail;
    this.seen = found;
    if (!same) this.changed();
    this.pointed(found);
  }
}

// Returns the empty canvas's context, turned with the view, and the canvas pixels per CSS pixel.
export function cleared(canvas, view) {
  const ratio = window.devicePixelRatio || 1;
  const [width, height] = [Math.round(view.width * ratio), Math.round(view.height * ratio)];
  if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
  const context = canvas.getContext("2d");
  context.resetTransform();
  context.clearRect(0, 0, width, height);
  context.translate(width / 2, height / 2);
  context.rotate((view.degrees * Math.PI) / 180);
  context.translate(-width / 2, -height / 2);
  return [context, ratio];
}

// Returns the path of a polygon on the canvas of an upright view.
export function pathOf(found, view, ratio) {
  const k = view.zoom * ratio;
  const [x, y] = [(view.width / 2) * ratio - view.x * k, (view.height / 2) * ratio - view.y * k];
  const path = new Path2D();
  for (const xy of found.rings) {
    path.moveTo(xy[0] * k + x, xy[1] * k + y);
    for (let p = 2; p < xy.length; p += 2) path.lineTo(xy[p] * k + x, xy[p + 1] * k + y);
    path.closePath();
  }
  return path;
}

function drawFound(context, view, ratio, found, classes) {
  const path = pathOf(found, view, ratio);
  context.fillStyle = `${classes[found.label - 1].color}40`;
  context.fill(path, "evenodd");
  strokeLines(context, path, ratio, [["#000", 5], ["#fff", 3]]);
}

// Draws lines of these styles and widths over each other along a path.
export function strokeLines(context, path, ratio, lines) {
  context.lineJoin = "bevel";
  for (const [style, width] of lines) {
    context.strokeStyle = style;
    context.lineWidth = width * ratio;
    context.stroke(path);
  }
}
