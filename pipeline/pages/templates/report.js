const get = (id) => document.getElementById(id);
const [text, status, sort, turn, noted, count] = ["text", "status", "sort", "turn", "noted", "count"].map(get);
const body = document.querySelector("tbody");
const collator = new Intl.Collator("en", { numeric: true, sensitivity: "base" });
const number = (value) => (value === "" || value === null ? null : Number(value));
const rows = [...body.rows].map((row) => {
  const areas = JSON.parse(row.dataset.areas);
  return {
    row, areas, all: areas.reduce((sum, area) => sum + area, 0), words: row.textContent.toLowerCase(),
    name: row.dataset.name, status: row.dataset.status, tissue: number(row.dataset.tissue), seconds: number(row.dataset.seconds),
  };
});

const isTurned = () => turn.getAttribute("aria-pressed") === "true";
const setTurned = (turned) => turn.setAttribute("aria-pressed", String(turned));

function value(entry, key) {
  const [what, index] = key.split(":");
  if (what === "area") return entry.areas[index];
  if (what === "share") return entry.all && entry.areas[index] !== null ? entry.areas[index] / entry.all : null;
  return entry[what];
}
function compare(a, b, key, sign) {
  const [x, y] = [value(a, key), value(b, key)];
  // Unknown values come last in both sort orders.
  if (x === null || y === null) return (x === null) - (y === null);
  return sign * (typeof x === "string" ? collator.compare(x, y) : x - y);
}
function order() {
  const sign = isTurned() ? -1 : 1;
  const before = [...rows];
  rows.sort((a, b) => compare(a, b, sort.value, sign) || collator.compare(a.name, b.name));
  if (rows.some((entry, i) => entry !== before[i])) body.append(...rows.map((entry) => entry.row));
  for (const button of document.querySelectorAll("thead button")) {
    const sorted = button.dataset.sort === sort.value ? (sign > 0 ? "ascending" : "descending") : "none";
    button.parentElement.setAttribute("aria-sort", sorted);
  }
}
function filter() {
  const words = text.value.toLowerCase().split(/\s+/);
  let shown = 0;
  for (const { row, words: rowText } of rows) {
    const fits = words.every((word) => rowText.includes(word)) && (!status.value || row.dataset.status === status.value)
      && (!noted.checked || "noted" in row.dataset);
    row.hidden = !fits;
    shown += fits;
  }
  const slides = rows.length === 1 ? "slide" : "slides";
  // A printed report without a filter shows all slides.
  count.classList.toggle("screen", shown === rows.length);
  count.textContent = shown === rows.length ? `${shown} ${slides}` : `${shown} of ${rows.length} ${slides}`;
}
for (const input of [text, status, noted]) input.addEventListener("input", filter);
sort.addEventListener("input", order);
turn.addEventListener("click", () => {
  setTurned(!isTurned());
  order();
});
for (const button of document.querySelectorAll("thead button"))
  button.addEventListener("click", () => {
    setTurned(sort.value === button.dataset.sort && !isTurned());
    sort.value = button.dataset.sort;
    order();
  });
document.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
document.querySelector("form").hidden = false;
// When the user returns to the page, the browser restores the controls but not the order and the filter.
addEventListener("pageshow", () => { order(); filter(); });
