// Tells people what happened: announcements for screen readers, and notes beside the slide.

const byId = (id) => document.getElementById(id);

export function announce(text) { byId("announcement").textContent = text; }

// Returns the new note, to remove it later.
export function note(text, role = "alert") {
  const paragraph = document.createElement("p");
  paragraph.setAttribute("role", role);
  paragraph.textContent = text;
  byId("notes").append(paragraph);
  return paragraph;
}
