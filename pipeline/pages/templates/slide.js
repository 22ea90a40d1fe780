const stage = document.getElementById("stage");
const opacity = document.getElementById("opacity");
const outlines = document.getElementById("outlines");
const unfamiliar = document.getElementById("unfamiliar");
const toggles = [...document.querySelectorAll("input[data-class]")];

function show() {
  stage.style.setProperty("--opacity", opacity.value / 100);
  document.getElementById("percent").textContent = `${opacity.value} %`;
  opacity.setAttribute("aria-valuetext", `${opacity.value} %`);
  stage.classList.toggle("no-outlines", !outlines.checked);
  if (unfamiliar) document.getElementById("unfamiliar-layer").hidden = !unfamiliar.checked;
  for (const toggle of toggles)
    for (const layer of stage.querySelectorAll(`img[data-class="${toggle.dataset.class}"]`)) layer.hidden = !toggle.checked;
}
function set(checked) {
  for (const toggle of toggles) if (!toggle.disabled && !("leftOut" in toggle.dataset)) toggle.checked = checked;
  show();
}
for (const input of [opacity, outlines, unfamiliar, ...toggles]) input?.addEventListener("input", show);
document.getElementById("all").addEventListener("click", () => set(true));
document.getElementById("none").addEventListener("click", () => set(false));
for (const part of document.querySelectorAll("[data-script]")) part.hidden = false;
// When the user returns to the page, the browser restores the controls but not the picture.
addEventListener("pageshow", show);
