// Saves the view as a PNG with the scale bar and a legend of what is shown.

import { distance, magnification, nice } from "./readout.js";

const LINE = 22; // CSS pixels
const INK = "#1c1c20";

// Returns the view as a canvas: the layers of `stage`, and over them the canvases `drawn` in this order. `entries` has
// {name, color, fill} for each line of the legend.
export function pictureOf(stage, drawn, entries) {
  const { view, ratio, canvas, context } = emptyPicture(stage);
  for (const layer of [stage.osd.drawer.canvas, ...drawn]) {
    context.globalAlpha = layer.style.opacity === "" ? 1 : Number(layer.style.opacity);
    context.drawImage(layer, 0, 0, canvas.width, canvas.height);
  }
  context.globalAlpha = 1;
  context.scale(ratio, ratio);
  context.font = "14px system-ui, sans-serif";
  context.textBaseline = "middle";
  drawScale(context, view, stage.facts.mpp);
  if (entries.length) drawLegend(context, view, entries);
  return canvas;
}

function emptyPicture(stage) {
  const view = stage.view();
  const ratio = window.devicePixelRatio || 1;
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [Math.round(view.width * ratio), Math.round(view.height * ratio)];
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  return { view, ratio, canvas, context };
}

function box(context, left, top, width, height) {
  context.fillStyle = "#ffffffe6";
  context.fillRect(left, top, width, height);
  context.fillStyle = INK;
}

function drawScale(context, view, mpp) {
  const um = nice((150 / view.zoom) * mpp);
  const length = (um / mpp) * view.zoom;
  const text = `${distance(um)} · ${magnification(view.zoom, mpp)}`;
  const width = Math.max(length, context.measureText(text).width) + 20;
  const [left, top] = [10, view.height - 50];
  box(context, left, top, width, 40);
  context.fillText(text, left + 10, top + 13);
  context.fillRect(left + 10, top + 27, length, 4);
}

function drawLegend(context, view, entries) {
  const width = Math.max(...entries.map(({ name }) => context.measureText(name).width)) + 46;
  const height = entries.length * LINE + 12;
  const [left, top] = [view.width - width - 10, view.height - height - 10];
  box(context, left, top, width, height);
  for (const [line, { name, color, fill }] of entries.entries()) {
    const y = top + 6 + line * LINE;
    context.fillStyle = fill;
    context.fillRect(left + 10, y + 4, 16, 14);
    context.strokeStyle = color;
    context.lineWidth = 2;
    context.strokeRect(left + 11, y + 5, 14, 12);
    context.fillStyle = INK;
    context.fillText(name, left + 36, y + LINE / 2);
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
