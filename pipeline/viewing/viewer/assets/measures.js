// Measures distances and areas on the slide, with the mouse, by touch, or with keys at the crosshair.

import { announce } from "./notices.js";
import { cleared } from "./outlines.js";
import { distance, surface } from "./readout.js";
import { crossesItself, enclosedArea, KINDS, lineLength } from "./shapes.js";
import { screenOf } from "./views.js";

const byId = (id) => document.getElementById(id);
const SAME_PX = 12; // a click this close to the first point closes an area

export class Measures {
  // `pointer` rests while a tool takes the clicks.
  constructor(facts, stage, pointer) {
    Object.assign(this, { facts, stage, pointer });
    this.kind = null; // the tool that takes the clicks: a key of KINDS
    this.points = []; // level-0 places of the shape that is being drawn
    this.done = []; // {kind, points} of the finished ones
    this.changed = () => {};
    const tool = (id, action) => byId(id).addEventListener("click", () => {
      action();
      if (this.kind) stage.osd.canvas.focus(); // the next Space or Enter is for the shape, not for the button
      else if (byId("measure-ends").hidden) byId("measure-distance").focus(); // a hidden button would lose the focus
    });
    for (const kind of Object.keys(KINDS)) tool(`measure-${kind}`, () => this.turn(kind));
    tool("measure-point", () => this.addCenter());
    tool("measure-finish", () => this.finish());
    tool("measure-undo", () => this.undo());
    tool("measure-clear", () => this.clear());
    this.render();
  }

  // Takes up a tool, or puts it away if it is in use.
  turn(kind) {
    this.kind = this.kind === kind ? null : kind;
    this.points = [];
    this.pointer.resting = Boolean(this.kind);
    this.pointer.find(null);
    for (const device of ["Mouse", "Touch", "Pen"]) this.stage.osd[`gestureSettings${device}`].dblClickToZoom = !this.kind;
    const ends = { distance: "click or press Space at both ends", area: "click or press Space at each corner, then press Enter" };
    for (const key of document.querySelectorAll("#measure-ends kbd")) key.hidden = !this.kind; // then the keys do other things
    announce(this.kind ? `Measure ${KINDS[kind].title.toLowerCase()}: ${ends[kind]}` : "Measuring ended");
    this.update();
  }

  // Returns what a key does, or undefined if it has another meaning.
  key(key) {
    if (key === "d") return () => this.turn("distance");
    if (key === "a") return () => this.turn("area");
    if (!this.kind) return undefined;
    return {
      " ": () => this.addCenter(), Enter: () => this.finish(), z: () => this.undo(), Delete: () => this.clear(),
      Escape: () => this.turn(this.kind),
    }[key];
  }

  // Adds the place at a screen position.
  click(position) {
    const view = this.stage.view();
    const near = (point) => Math.hypot(...screenOf(view, point).map((value, axis) => value - position[axis])) < SAME_PX;
    if (this.points.length >= KINDS[this.kind].needed && near(this.points[0])) this.finish();
    else if (!this.points.length || !near(this.points.at(-1))) this.add(this.stage.placeAt(...position));
  }

  addCenter() {
    const { width, height } = this.stage.view();
    this.click([width / 2, height / 2]);
  }

  add(point) {
    this.points.push(point);
    if (this.kind === "distance" && this.points.length === 2) this.finish();
    else {
      announce(`Point ${this.points.length}`);
      this.update();
    }
  }

  finish() {
    const { needed } = KINDS[this.kind];
    if (this.points.length < needed) {
      announce(`This needs ${needed} points`);
      return;
    }
    this.done.push({ kind: this.kind, points: this.points });
    this.points = [];
    announce(this.text(this.done.at(-1)));
    this.update();
  }

  // Takes back the last point, or the last measurement if no shape is being drawn.
  undo() {
    const undone = this.points.pop() ?? this.done.pop();
    announce(undone ? "Undone" : "Nothing to undo");
    this.update();
  }

  clear() {
    [this.points, this.done] = [[], []];
    announce("All measurements removed");
    this.update();
  }

  text({ kind, points }) { return `${KINDS[kind].title} ${this.value(kind, points)}`; }

  value(kind, points) {
    const { mpp } = this.facts;
    if (kind === "distance") return distance(lineLength(points) * mpp);
    return crossesItself(points) ? "not defined: the line crosses itself" : surface(enclosedArea(points) * mpp ** 2);
  }

  update() {
    this.render();
    this.changed();
  }

  render() {
    for (const kind of Object.keys(KINDS)) byId(`measure-${kind}`).setAttribute("aria-pressed", String(this.kind === kind));
    byId("crosshair").hidden = !this.kind;
    byId("measuring").hidden = !this.kind;
    byId("measure-finish").hidden = this.kind !== "area";
    byId("measure-ends").hidden = !this.done.length && !this.points.length;
    this.stage.element.classList.toggle("measuring", Boolean(this.kind));
    byId("measurements").replaceChildren(...this.done.map((one) => {
      const line = document.createElement("li");
      line.textContent = this.text(one);
      return line;
    }));
  }

  // Draws the measurements for a view. Called for every frame of the slide.
  draw(view) {
    const [context, ratio] = cleared(byId("measures"), { ...view, degrees: 0 });
    const drawing = { kind: this.kind, points: this.points };
    if (this.kind && this.points.length && this.pointer.position) drawing.points = [...this.points, this.pointer.place(view)];
    for (const one of [...this.done, ...(drawing.points.length ? [drawing] : [])]) this.drawOne(context, view, ratio, one);
  }

  drawOne(context, view, ratio, { kind, points }) {
    const corners = points.map((point) => screenOf(view, point).map((value) => value * ratio));
    const path = new Path2D();
    corners.forEach(([x, y], p) => { if (p) path.lineTo(x, y); else path.moveTo(x, y); });
    if (kind === "area" && points.length > 2) path.closePath();
    for (const [x, y] of corners) path.rect(x - 2 * ratio, y - 2 * ratio, 4 * ratio, 4 * ratio);
    for (const [style, width] of [["#000", 4], ["#fff", 2]]) {
      context.strokeStyle = style;
      context.lineWidth = width * ratio;
      context.stroke(path);
    }
    if (points.length >= KINDS[kind].needed) drawLabel(context, this.value(kind, points), corners.at(-1), ratio);
  }
}

function drawLabel(context, text, [x, y], ratio) {
  context.font = `${13 * ratio}px system-ui, sans-serif`;
  context.textBaseline = "middle";
  const [left, top, height] = [x + 10 * ratio, y - 10 * ratio, 20 * ratio];
  context.fillStyle = "#fffffff0";
  context.fillRect(left, top, context.measureText(text).width + 10 * ratio, height);
  context.fillStyle = "#000";
  context.fillText(text, left + 5 * ratio, top + height / 2);
}
