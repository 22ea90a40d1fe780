// Saves the view as a PNG with the scale bar and a legend of what is shown.

import { distance, magnification, nice } from "./readout.js";

// In CSS pixels.
const LINE = 22;
const MARGIN = 10;
const SWATCH = 26; // with the gap after it
const FONT = "14px system-ui, sans-serif";
const INK = "#1c1c20";

// Returns the view as a canvas: the layers of `stage`, and over them the canvases `drawn` in this order. `entries` has
// {name, color, fill} for each line of the legend, which lies below the view.
export function pictureOf(stage, drawn, entries) {
  const view = stage.view();
  const ratio = window.devicePixelRatio || 1;
  const canvas = document.createElement("canvas");
  const context = canvas.getContext("2d");
  const legend = legendOf(context, view, entries);
  const [width, height] = [Math.round(view.width * ratio), Math.round(view.height * ratio)];
  [canvas.width, canvas.height] = [width, height + Math.round(legend.height * ratio)];
  context.fillStyle = "#fff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  for (const layer of [stage.osd.drawer.canvas, ...drawn]) {
    context.globalAlpha = layer.style.opacity === "" ? 1 : Number(layer.style.opacity);
    context.drawImage(layer, 0, 0, width, height);
  }
  context.globalAlpha = 1;
  context.scale(ratio, ratio);
  context.font = FONT;
  context.textBaseline = "middle";
  drawScale(context, view, stage.facts.mpp);
  drawLegend(context, view.height, legend);
  return canvas;
}

function drawScale(context, view, mpp) {
  const um = nice((150 / view.zoom) * mpp);
  const length = (um / mpp) * view.zoom;
  const text = `${distance(um)} · ${magnification(view.zoom, mpp)}`;
  const width = Math.max(length, context.measureText(text).width) + 20;
  const [left, top] = [10, view.height - 50];
  context.fillStyle = "#ffffffe6";
  context.fillRect(left, top, width, 40);
  context.fillStyle = INK;
  context.fillText(text, left + 10, top + 13);
  context.fillRect(left + 10, top + 27, length, 4);
}

// Returns {lines, column, height}: the entries in as many columns of this width as fit below the view.
function legendOf(context, view, entries) {
  context.font = FONT;
  const most = view.width - 2 * MARGIN - SWATCH;
  const named = entries.map((entry) => ({ ...entry, name: shortened(context, entry.name, most) }));
  const column = Math.max(0, ...named.map(({ name }) => context.measureText(name).width)) + SWATCH + 2 * MARGIN;
  const columns = Math.max(1, Math.floor(view.width / column));
  const lines = [];
  while (named.length) lines.push(named.splice(0, columns));
  return { lines, column, height: lines.length && lines.length * LINE + 12 };
}

// Cuts a text so that it is at most so many pixels wide.
function shortened(context, text, most) {
  const fits = (part) => context.measureText(part).width <= most;
  if (fits(text)) return text;
  const letters = [...text];
  while (letters.length && !fits(`${letters.join("")}…`)) letters.pop();
  return `${letters.join("")}…`;
}

function drawLegend(context, below, { lines, column }) {
  for (const [line, entries] of lines.entries()) {
    const top = below + 6 + line * LINE;
    for (const [place, { name, color, fill }] of entries.entries()) {
      const left = MARGIN + place * column;
      context.fillStyle = fill;
      context.fillRect(left, top + 4, 16, 14);
      context.strokeStyle = color;
      context.lineWidth = 2;
      context.strokeRect(left + 1, top + 5, 14, 12);
      context.fillStyle = INK;
      context.fillText(name, left + SWATCH, top + LINE / 2);
    }
  }
}

// Downloads a canvas as a file.
export async function download(canvas, name) {
  const blob = await new Promise((done) => { canvas.toBlob(done, "image/png"); });
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}
